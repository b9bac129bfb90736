"""One engine step: a ragged batch of rows in, sampled tokens out, KV left in the pool.

The engine loops of both worker kinds call `ModelRunner.step` once per step, from one thread;
prefill chunks, decode steps and mixed batches are the same call.
"""

from collections.abc import Sequence
from typing import Final

import torch

from common.kv.pool import KvPool
from common.model.batch import Row, Sample, Sampled
from common.model.decoder import Kernels, open_decoder
from common.model.guides import Guides
from common.model.sampler import Sampler, score
from common.model.spec import ModelSpec
from common.model.weights import Weights

SCORED_AT_ONCE: Final = 64
"""Tokens whose logits are held at a time while a prompt is scored."""


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
        self._sampler = Sampler(
            spec.vocab_size, spec.eos_token_ids, guides, self._decoder.draw_random
        )

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> list[tuple[Sampled, ...]]:
        """Compute all rows; per row, one `Sampled` per entry of `row.samples`.

        The KV of every row's tokens is in its blocks when this returns, on a GPU too: transfers
        copy it on other streams. No slot may be written twice.
        """
        if not rows:
            return []
        for row in rows:
            held = len(row.blocks) * self.pool.layout.block_size
            assert row.tokens and row.start + len(row.tokens) <= held, (row.start, held)
        plain = [i for i, row in enumerate(rows) if row.scoring is None]
        results: list[tuple[Sampled, ...]] = [()] * len(rows)
        for i, sampled in zip(plain, self._compute([rows[i] for i in plain]), strict=True):
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

    def _compute(self, rows: Sequence[Row]) -> list[tuple[Sampled, ...]]:
        if not rows:
            return []
        sampling = [i for i, row in enumerate(rows) if row.samples]
        greedy = [all(map(self._sampler.takes_best, rows[i].samples)) for i in sampling]
        best, logits = self._decoder.compute(rows, sampling, greedy)
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
