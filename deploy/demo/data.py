"""Turns the text into token streams, and the streams into batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deploy.demo import chat, corpus
from deploy.demo.export import train_tokenizer

Tokens = NDArray[np.int64]
VOCABULARY = 3072
CHAT_SHARE = 0.3  # of the rows of a batch


@dataclass(frozen=True)
class Data:
    """Token streams: prose and conversations to train on, prose held out, conversation starts."""

    prose: Tokens
    talk: Tokens
    starts: Tokens
    held_out: Tokens


def prepare(docs: Path | None, packages: list[str], seed: int) -> tuple[Any, Data, dict[str, Any]]:
    """The tokenizer, the token streams, and what is recorded about the text."""
    documents = corpus.assemble(docs, packages)
    kept = [d for i, d in enumerate(documents) if i % 50 != 49]
    held_out = [d for i, d in enumerate(documents) if i % 50 == 49]
    talks = chat.conversations(kept, seed)
    texts = [d.text for d in kept]
    spoken = [t for talk in talks for t in talk.split("<|")]
    tokenizer = train_tokenizer([*texts, *(t.split("|>")[-1] for t in spoken)], VOCABULARY)

    def encode(items: list[str]) -> list[list[int]]:
        return [e.ids for e in tokenizer.encode_batch(items)]

    def stream(rows: list[list[int]]) -> Tokens:
        return np.array([token for row in rows for token in row], dtype=np.int64)

    rows = encode(talks)
    data = Data(
        stream(encode([chat.BOS + t + chat.EOS for t in texts])),
        stream(rows),
        np.cumsum([0, *(len(row) for row in rows)])[:-1],
        stream(encode([chat.BOS + d.text + chat.EOS for d in held_out])),
    )
    facts = {
        "documents": len(kept),
        "characters": sum(map(len, texts)),
        "conversations": len(talks),
        "tokens": len(data.prose),
        "chat_tokens": len(data.talk),
        "held_out_documents": len(held_out),
        "held_out_tokens": len(data.held_out),
        "sha256": corpus.digest([*texts, *talks]),
    }
    words = corpus.vocabulary([*texts, *spoken])
    return tokenizer, data, {"corpus": facts, "words": words}


def batch(data: Data, seed: int, step: int, rows: int, length: int) -> torch.Tensor:
    """Rows of ``length + 1`` tokens; those of conversations begin where one begins."""
    rng = np.random.default_rng([seed, step])
    result = np.empty((rows, length + 1), dtype=np.int64)
    for row in range(rows):
        if rng.random() < CHAT_SHARE:
            limit = int(np.searchsorted(data.starts, len(data.talk) - length - 1))
            start, source = int(data.starts[rng.integers(limit)]), data.talk
        else:
            start, source = int(rng.integers(len(data.prose) - length - 1)), data.prose
        result[row] = source[start : start + length + 1]
    return torch.from_numpy(result)
