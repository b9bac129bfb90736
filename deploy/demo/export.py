"""Writes the demo model in the form that ``transformers`` loads."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from deploy.demo import chat


def train_tokenizer(texts: Sequence[str], size: int) -> Tokenizer:
    """A byte-level BPE: all 256 bytes are in its vocabulary, so that any text has a spelling."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(chat.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def edit(path: Path, **changes: Any) -> None:
    """Sets top-level entries of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(changes)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export(
    model: Any,
    tokenizer: Tokenizer,
    words: Sequence[str],
    record: dict[str, Any],
    out: Path,
) -> None:
    """Writes weights, configuration, tokenizer and record to ``out``, the words beside it."""
    out.mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16)
    special = {
        name: tokenizer.token_to_id(token)
        for name, token in (
            ("bos_token_id", chat.BOS),
            ("eos_token_id", chat.EOS),
            ("pad_token_id", chat.PAD),
        )
    }
    library: Any = transformers
    model.generation_config = library.GenerationConfig(do_sample=False, **special)
    model.save_pretrained(out)
    fast = library.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=chat.BOS,
        eos_token=chat.EOS,
        pad_token=chat.PAD,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat.TEMPLATE
    fast.save_pretrained(out)
    # Releases of transformers differ in these names; the files carry those that all of them read.
    edit(out / "config.json", torch_dtype="bfloat16", rope_theta=10000.0)
    edit(
        out / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        chat_template=chat.TEMPLATE,
    )
    (out / "model.safetensors").chmod(0o644)
    (out / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    packed = gzip.compress("\n".join(words).encode(), 9, mtime=0)
    (out.parent / "words.txt.gz").write_bytes(packed)
