"""One engine step: a ragged batch of rows in, sampled tokens out, KV left in the pool.

The engine loops of both worker kinds call `ModelRunner.step` once per step, from one thread;
prefill chunks, decode steps and mixed batches are the same call.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from common.kv.pool import KvPool
from common.model import llama
from common.model.attention import LayerPool
from common.model.attention_plan import Planner
from common.model.batch import Row, Sampled
from common.model.rope import Rotary
from common.model.sampler import Sampler
from common.model.spec import ModelSpec
from common.model.weights import Weights


class ModelRunner:
    """A model and the KV pool that it reads and writes, on one device."""

    def __init__(self, spec: ModelSpec, weights: Weights, pool: KvPool) -> None:
        """`pool` must have the layout of `spec`, and dtype and device of `weights`."""
        layout = pool.layout
        assert layout == spec.layout(layout.block_size, layout.dtype), (layout, spec)
        assert pool.tensor.dtype == weights.dtype, (pool.tensor.dtype, weights.dtype)
        assert pool.tensor.device == weights.device, (pool.tensor.device, weights.device)
        self.spec = spec
        self.pool = pool
        self._weights = weights
        self._layer_pools = tuple(LayerPool(pool.tensor, layer) for layer in range(spec.num_layers))
        self._planner = Planner(layout, spec.windows, weights.dtype, weights.device)
        self._rotary = Rotary(spec.rope, spec.head_dim, weights.device)
        self._sampler = Sampler(spec.vocab_size, spec.eos_token_ids)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> list[tuple[Sampled, ...]]:
        """Compute all rows; per row, one `Sampled` per entry of `row.samples`.

        The KV of every row's tokens is in its blocks afterwards; no slot may be written twice.
        """
        if not rows:
            return []
        device = self._weights.device
        counts = [len(row.tokens) for row in rows]
        tokens = np.fromiter(chain.from_iterable(row.tokens for row in rows), np.int64, sum(counts))
        positions = np.concatenate(
            [np.arange(row.start, row.start + len(row.tokens)) for row in rows]
        )
        hidden = llama.forward(
            self.spec,
            self._weights,
            self._layer_pools,
            self._planner.plan(rows),
            self._rotary.tables(torch.from_numpy(positions).to(device), self._weights.dtype),
            torch.from_numpy(tokens).to(device),
        )
        sampled = iter(self._sample(rows, np.cumsum(counts) - 1, hidden))
        return [tuple(next(sampled) for _ in row.samples) for row in rows]

    def copy_block(self, source: int, target: int) -> None:
        """Copy all of a block: a partial tail that a fork goes on writing."""
        self.pool.tensor[target].copy_(self.pool.tensor[source])

    def _sample(
        self, rows: Sequence[Row], last_tokens: np.ndarray, hidden: torch.Tensor
    ) -> list[Sampled]:
        """All samples of the step, in the order of rows and choices."""
        sampling = [i for i, row in enumerate(rows) if row.samples]
        if not sampling:
            return []
        last = torch.from_numpy(last_tokens[sampling]).to(hidden.device)
        logits = llama.logits(self.spec, self._weights, hidden[last])
        return self._sampler.draw(
            logits,
            [(line, sample) for line, i in enumerate(sampling) for sample in rows[i].samples],
        )
