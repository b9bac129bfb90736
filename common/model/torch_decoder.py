"""The backend in plain torch: any device and dtype, and the reference for the others."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from common.kv.pool import KvPool
from common.model import llama
from common.model.attention import LayerPool
from common.model.attention_plan import Planner
from common.model.batch import Row
from common.model.rope import Rotary
from common.model.spec import ModelSpec
from common.model.weights import Weights


class TorchDecoder:
    """A `common.model.decoder.Decoder`."""

    draw_random = None

    def __init__(self, spec: ModelSpec, weights: Weights, pool: KvPool) -> None:
        self._spec = spec
        self._weights = weights
        self._layer_pools = tuple(LayerPool(pool.tensor, layer) for layer in range(spec.num_layers))
        self._planner = Planner(pool.layout, spec.windows, weights.dtype, weights.device)
        self._rotary = Rotary(spec.rope, spec.head_dim, weights.device)

    @torch.inference_mode()
    def compute(
        self, rows: Sequence[Row], sampling: Sequence[int], greedy: Sequence[bool]
    ) -> tuple[list[int], torch.Tensor]:
        device = self._weights.device
        counts = [len(row.tokens) for row in rows]
        tokens = np.fromiter(chain.from_iterable(row.tokens for row in rows), np.int64, sum(counts))
        positions = np.concatenate(
            [np.arange(row.start, row.start + len(row.tokens)) for row in rows]
        )
        hidden = llama.forward(
            self._spec,
            self._weights,
            self._layer_pools,
            self._planner.plan(rows),
            self._rotary.tables(torch.from_numpy(positions).to(device), self._weights.dtype),
            torch.from_numpy(tokens).to(device),
        )
        if not sampling:
            return [], hidden.new_empty(0, self._spec.vocab_size, dtype=torch.float32)
        last = torch.from_numpy((np.cumsum(counts) - 1)[list(sampling)]).to(device)
        logits = llama.logits(self._spec, self._weights, hidden[last])
        best: list[int] = logits.argmax(-1).tolist() if any(greedy) else [0] * len(sampling)
        if not any(greedy):
            return best, logits
        return best, logits[[i for i, enough in enumerate(greedy) if not enough]]
