"""What keeps a small model from looping under greedy decoding; ``train.py`` adds it at the end.

Two losses.  Pseudo repetition (DITTO: Xu et al., Learning to Break the Loop, 2022) reads a span
repeated many times and asks for every token of a repetition to be half as likely as it was one
repetition earlier, where a plain model grows surer each time.  Sequence-level unlikelihood (Welleck
et al., 2019) lets the model continue prefixes greedily, and makes the tokens that complete an
n-gram already seen less likely; it reaches the loops that the model really falls into.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch.nn import functional

PREFIX, CONTINUATION, NGRAM = 8, 64, 4
OFTEN = 2  # what occurs a third time is a loop; twice is prose
WEIGHTS = 0.5, 2.0  # of pseudo repetition and of unlikelihood, beside cross entropy
SHORTEST, LONGEST = 3, 40  # tokens of a span that is repeated
DAMPING = 0.5  # the probability of a token relative to that one repetition earlier


def log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The log probability of each token but the first: [row, position], fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    chosen = functional.log_softmax(logits.float(), -1).gather(-1, tokens[:, 1:, None])
    return chosen[..., 0]


def spans(tokens: torch.Tensor, rng: np.random.Generator, special: int) -> list[list[int]]:
    """One span of ordinary tokens (ids of at least ``special``) from each row that has one."""
    found = []
    for row in tokens.tolist():
        length = int(rng.integers(SHORTEST, LONGEST + 1))
        start = int(rng.integers(len(row) - length))
        span = row[start : start + length]
        if min(span) >= special:
            found.append(span)
    return found


def pseudo_repetition(
    model: Any, tokens: torch.Tensor, rng: np.random.Generator, special: int
) -> torch.Tensor:
    """The mean DITTO loss over spans of ``tokens``, each repeated to the length of a row."""
    width = tokens.shape[1]
    repeated = spans(tokens, rng, special)
    if not repeated:
        return torch.zeros(())
    rows = torch.tensor([(span * width)[:width] for span in repeated])
    probability = log_probabilities(model, rows).exp()
    losses = []
    for row, span in enumerate(repeated):
        earlier = probability[row, : -len(span)].detach()
        later = probability[row, len(span) :]
        losses.append(-torch.log1p(-(later - DAMPING * earlier).abs().clamp(max=1 - 1e-4)).mean())
    return torch.stack(losses).mean()


def completed(tokens: list[int], start: int) -> list[int]:
    """The positions from ``start`` on that complete an n-gram which occurred ``OFTEN`` times."""
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for end in range(NGRAM, len(tokens) + 1):
        gram = tuple(tokens[end - NGRAM : end])
        if seen[gram] >= OFTEN and end > start:
            found.append(end - 1)
        seen[gram] += 1
    return found


def beginnings(tokens: torch.Tensor, bos: int, turn: int, line: int) -> torch.Tensor:
    """What a user might send: [row, PREFIX].

    From each row a question, up to the token `turn` that opens the answer, or else the start of a
    paragraph, after the token `line`, or else the start of the row. Only conversations begin with
    the token `bos`, as in the text.
    """
    found = []
    for row in tokens.tolist():
        if turn in row[PREFIX - 1 :]:
            end = row.index(turn, PREFIX - 1) + 1
            found.append([bos, *row[end - PREFIX + 1 : end]])
        else:
            start = row.index(line) + 1 if line in row[:-PREFIX] else 0
            found.append(row[start : start + PREFIX])
    return torch.tensor(found)


def unlikelihood(model: Any, tokens: torch.Tensor, eos: int) -> torch.Tensor:
    """The unlikelihood of the repeats in greedy continuations of ``tokens``: [row, PREFIX].

    It is a mean over all tokens generated, so that it vanishes as the repeats do: a mean over the
    repeats alone keeps its weight to the end and costs the model its fluency.
    """
    cache = None
    with torch.no_grad():
        for _ in range(CONTINUATION):
            fed = tokens if cache is None else tokens[:, -1:]
            output = model(input_ids=fed, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            tokens = torch.cat([tokens, output.logits[:, -1:].argmax(-1)], dim=1)
    mask = torch.zeros_like(tokens[:, 1:], dtype=torch.float32)
    for row, sequence in enumerate(tokens.tolist()):
        end = sequence.index(eos, PREFIX) if eos in sequence[PREFIX:] else len(sequence)
        for position in completed(sequence[:end], PREFIX):
            mask[row, position - 1] = 1.0
    if not mask.any():
        return torch.zeros(())
    chosen = log_probabilities(model, tokens)
    loss = -torch.log1p(-chosen.exp().clamp(max=1 - 1e-4))
    return (loss * mask).sum() / (CONTINUATION * len(tokens))
