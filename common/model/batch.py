"""What one engine step computes: a ragged batch of rows, and what comes back.

A row is one sequence's contribution to the step: 1..n consecutive tokens whose KV is written to
the pool. Prefill chunks, decode steps and mixed batches are the same thing with other counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Only here: a step of a model can be computed where msgspec is not installed.
    from common.messages import TokenLogprob
    from common.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Sample:
    """Draw the next token of one choice from the logits of a row's last token.

    `tokens[:prompt_len]` is the prompt, the rest was generated; penalties, `min_tokens` and the
    random number of this draw (output index `len(tokens) - prompt_len`) follow from them alone.
    """

    choice: int
    params: SamplingParams
    tokens: Sequence[int]
    prompt_len: int


@dataclass(frozen=True, slots=True)
class Scoring:
    """Log-probabilities of known tokens: `targets[i]` comes after token i of the row."""

    targets: Sequence[int]
    num_top: int
    scores: list[TokenLogprob]
    """Where the runner appends them, one for each target."""


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens `start .. start + len(tokens)` of one sequence.

    `blocks` is its block table, long enough for `start + len(tokens)` tokens; the KV of the
    first `start` tokens is already there. `samples` is empty unless the row ends with the last
    known token of the sequence; it has one entry per choice that continues from there.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    samples: tuple[Sample, ...] = ()
    scoring: Scoring | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token drawn for one `Sample`."""

    token: int
    """-1: there is none, the grammar of the choice cannot be followed any further."""
    logprob: TokenLogprob | None
