"""One engine step: a ragged batch of rows in, sampled tokens out, KV left in the pool.

The engine loops of both worker kinds call `ModelRunner.step` once per step, from one thread;
prefill chunks, decode steps and mixed batches are the same call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from common.kv.pool import KvPool
from common.model.batch import Row, Sample, Sampled
from common.model.decoder import Computed, Kernels, LaunchedRows, Launching, open_decoder
from common.model.guides import Guides
from common.model.sampler import Sampler, score
from common.model.spec import ModelSpec
from common.model.weights import Weights

SCORED_AT_ONCE: Final = 64
"""Tokens whose logits are held at a time while a prompt is scored."""


@dataclass(frozen=True, slots=True)
class _Computing:
    """Rows that the decoder computes: which are looked at, and how."""

    sampling: list[int]
    greedy: list[bool]
    launched: LaunchedRows


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that was begun."""

    runner: "ModelRunner"
    rows: Sequence[Row]
    plain: Sequence[int]
    """Rows that are not scored."""
    computing: _Computing | None

    @torch.inference_mode()
    def collect(self) -> list[tuple[Sampled, ...]]:
        """Wait for it; gives what `ModelRunner.step` gives. Rows that are scored are computed
        here."""
        return self.runner.finish(self.rows, self.plain, self.computing)


class ModelRunner:
    """A model and the KV pool that it reads and writes, on one device."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        pool: KvPool,
        *,
        kernels: Kernels = "auto",
        threads: int = 0,
        guides: Guides | None = None,
    ) -> None:
        """`pool` must have the layout of `spec`, and dtype and device of `weights`.

        threads: of CPU kernels; 0: as many as torch uses. guides: what follows the grammars of
        requests; None: a request with a grammar ends at once. Raises BuildError if `kernels` are
        native and cannot be compiled.
        """
        layout = pool.layout
        assert layout == spec.layout(layout.block_size, layout.dtype), (layout, spec)
        assert pool.tensor.dtype == weights.dtype, (pool.tensor.dtype, weights.dtype)
        assert pool.tensor.device == weights.device, (pool.tensor.device, weights.device)
        self.spec = spec
        self.pool = pool
        self._decoder = open_decoder(
            spec, weights, pool, kernels, threads or torch.get_num_threads()
        )
        launching = self._decoder if isinstance(self._decoder, Launching) else None
        self._launching: Launching | None = launching  # known once: to ask takes a while
        self._sampler = Sampler(
            spec.vocab_size, spec.eos_token_ids, guides, self._decoder.draw_random
        )

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> list[tuple[Sampled, ...]]:
        """Compute all rows; per row, one `Sampled` per entry of `row.samples`.

        The KV of every row's tokens is in its blocks when this returns, on a GPU too: transfers
        copy it on other streams. No slot may be written twice.
        """
        return self.launch(rows).collect()

    @property
    def overlaps(self) -> bool:
        """Whether a GPU computes a step while the caller of `launch` does something else."""
        return self.pool.tensor.device.type == "cuda" and self._launching is not None

    @torch.inference_mode()
    def launch(self, rows: Sequence[Row]) -> "LaunchedStep":
        """Begin a step; see `step`. Where nothing `overlaps` it is over when this returns, but
        for the draws. It must be collected before the next one is begun."""
        for row in rows:
            held = len(row.blocks) * self.pool.layout.block_size
            assert row.tokens and row.start + len(row.tokens) <= held, (row.start, held)
        plain = [i for i, row in enumerate(rows) if row.scoring is None]
        return LaunchedStep(self, rows, plain, self._launch([rows[i] for i in plain]))

    def finish(
        self, rows: Sequence[Row], plain: Sequence[int], computing: "_Computing | None"
    ) -> list[tuple[Sampled, ...]]:
        """The second half of a step: for `LaunchedStep` alone."""
        results: list[tuple[Sampled, ...]] = [()] * len(rows)
        if computing is not None:
            drawn = self._draw([rows[i] for i in plain], computing)
            for i, sampled in zip(plain, drawn, strict=True):
                results[i] = sampled
        for i, row in enumerate(rows):
            if row.scoring is not None:
                results[i] = self._score(row)
        self._wait()
        return results

    def _wait(self) -> None:
        """Until the GPU did all that it was asked for; nothing on a CPU."""
        device = self.pool.tensor.device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def _launch(self, rows: Sequence[Row]) -> "_Computing | None":
        if not rows:
            return None
        sampling = [i for i, row in enumerate(rows) if row.samples]
        greedy = [all(map(self._sampler.takes_best, rows[i].samples)) for i in sampling]
        launched: LaunchedRows
        if self._launching is not None:
            launched = self._launching.launch(rows, sampling, greedy)
        else:
            launched = Computed(self._decoder.compute(rows, sampling, greedy))
        return _Computing(sampling, greedy, launched)

    def _draw(self, rows: Sequence[Row], computing: "_Computing") -> list[tuple[Sampled, ...]]:
        sampling, greedy = computing.sampling, computing.greedy
        best, logits = computing.launched.collect()
        others = [i for i, enough in zip(sampling, greedy, strict=True) if not enough]
        drawn = iter(
            self._sampler.draw(
                logits,
                [(line, sample) for line, i in enumerate(others) for sample in rows[i].samples],
            )
        )
        results: list[tuple[Sampled, ...]] = [()] * len(rows)
        for i, token, enough in zip(sampling, best, greedy, strict=True):
            samples = rows[i].samples
            results[i] = tuple(Sampled(token, None) if enough else next(drawn) for _ in samples)
        return results

    def _score(self, row: Row) -> tuple[Sampled, ...]:
        """Compute a row whose tokens are all looked at.

        A decoder tells of the last token of a row only, so once the KV of all is in the pool each
        token is computed again as a row of its own, which leaves the same KV.
        """
        assert row.scoring is not None
        scoring = row.scoring
        drawn: tuple[Sampled, ...] = ()
        self._decoder.compute([row], [], [])
        for first in range(0, len(row.tokens), SCORED_AT_ONCE):
            tokens = row.tokens[first : first + SCORED_AT_ONCE]
            singles = [
                Row((token,), row.start + first + i, row.blocks) for i, token in enumerate(tokens)
            ]
            everyone = range(len(singles))
            _, logits = self._decoder.compute(singles, everyone, [False] * len(singles))
            targets = scoring.targets[first : first + len(singles)]
            scoring.scores.extend(score(logits[: len(targets)], targets, scoring.num_top))
            if first + len(singles) == len(row.tokens):
                last: list[tuple[int, Sample]] = [(len(singles) - 1, s) for s in row.samples]
                drawn = tuple(self._sampler.draw(logits, last))
        return drawn

    def copy_block(self, source: int, target: int) -> None:
        """Copy all of a block: a partial tail that a fork goes on writing. When this returns
        either may be freed, and then be written on another stream."""
        self.pool.tensor[target].copy_(self.pool.tensor[source])
        self._wait()
