"""One engine step: a ragged batch of rows in, sampled tokens out, KV left in the pool.

The engine loops of both worker kinds call `ModelRunner.step` once per step, from one thread;
prefill chunks, decode steps and mixed batches are the same call.
"""

from collections.abc import Sequence

import torch

from common.kv.pool import KvPool
from common.model.batch import Row, Sampled
from common.model.decoder import Kernels, open_decoder
from common.model.sampler import Sampler
from common.model.spec import ModelSpec
from common.model.weights import Weights


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
    ) -> None:
        """`pool` must have the layout of `spec`, and dtype and device of `weights`.

        threads: of CPU kernels; 0: as many as torch uses. Raises BuildError if `kernels` are
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
        self._sampler = Sampler(spec.vocab_size, spec.eos_token_ids)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> list[tuple[Sampled, ...]]:
        """Compute all rows; per row, one `Sampled` per entry of `row.samples`.

        The KV of every row's tokens is in its blocks afterwards; no slot may be written twice.
        """
        if not rows:
            return []
        for row in rows:
            held = len(row.blocks) * self.pool.layout.block_size
            assert row.tokens and row.start + len(row.tokens) <= held, (row.start, held)
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

    def copy_block(self, source: int, target: int) -> None:
        """Copy all of a block: a partial tail that a fork goes on writing."""
        self.pool.tensor[target].copy_(self.pool.tensor[source])
