"""The backend in C++: a whole step in one call, without the interpreter lock.

Made by `common.model.decoder` on CPUs for float32 and bfloat16. The results of a row depend on its
own tokens alone: not on the batch, nor on where its prefill was cut, nor on the number of threads.
"""

import ctypes
import weakref
from collections.abc import Sequence
from itertools import chain
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from common.kv.pool import KvPool
from common.model.batch import Row
from common.model.cpu import library
from common.model.cpu.library import (
    DTYPE_CODES,
    BatchStruct,
    LayerStruct,
    ModelStruct,
    matrix_struct,
)
from common.model.rope import Rotary
from common.model.spec import ModelSpec
from common.model.weights import LayerWeights, Weights

MAX_HEAD_DIM: Final = 512
FIRST_POSITIONS: Final = 1024
"""Positions whose angles are computed at first."""


class NativeDecoder:
    """A `common.model.decoder.Decoder`."""

    draw_random = None

    @staticmethod
    def supports(spec: ModelSpec, weights: Weights) -> bool:
        return (
            weights.device.type == "cpu"
            and weights.dtype in DTYPE_CODES
            and spec.head_dim <= MAX_HEAD_DIM
        )

    def __init__(self, spec: ModelSpec, weights: Weights, pool: KvPool, threads: int) -> None:
        """Packs the weights, of which only the embedding is kept as it is.

        Raises BuildError if the kernels cannot be compiled, MemoryError if the weights do not fit.
        """
        assert self.supports(spec, weights), (spec, weights.dtype, weights.device)
        self._library = library.load()
        self._vocab_size = spec.vocab_size
        self._num_blocks = pool.num_blocks
        self._kept = (weights.embedding, pool.tensor)
        self._positions = _Positions(spec, weights.dtype)
        layers = (LayerStruct * spec.num_layers)(*map(_layer_struct, weights.layers, spec.windows))
        model = ModelStruct(
            dtype=DTYPE_CODES[weights.dtype],
            threads=threads,
            vocab=spec.vocab_size,
            hidden=spec.hidden_size,
            inner=spec.intermediate_size,
            layers=spec.num_layers,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            block_size=pool.layout.block_size,
            eps=spec.rms_norm_eps,
            embedding=_address(weights.embedding),
            norm=_address(weights.norm),
            head=matrix_struct(weights.quantized_head or weights.head),
            layer=layers,
            pool=_address(pool.tensor),
        )
        self._handle = self._library.tandem_create(ctypes.byref(model))
        if not self._handle:
            raise MemoryError("no memory for the packed weights")
        weakref.finalize(self, self._library.tandem_destroy, self._handle)

    def compute(
        self, rows: Sequence[Row], sampling: Sequence[int], greedy: Sequence[bool]
    ) -> tuple[list[int], torch.Tensor]:
        starts = np.array([row.start for row in rows], np.int32)
        counts = np.array([len(row.tokens) for row in rows], np.int32)
        tables = np.array([len(row.blocks) for row in rows], np.int32)
        num_tokens = int(counts.sum())
        cos, sin = self._positions.up_to(int((starts + counts).max()))
        tokens = np.fromiter(chain.from_iterable(row.tokens for row in rows), np.int32, num_tokens)
        blocks = np.fromiter(chain.from_iterable(row.blocks for row in rows), np.int32)
        # The kernels index with these: what is wrong here would read or write foreign memory.
        assert 0 <= tokens.min() and tokens.max() < self._vocab_size, "token outside the vocabulary"
        assert 0 <= blocks.min() and blocks.max() < self._num_blocks, "block outside the pool"
        offsets = np.cumsum(tables, dtype=np.int32) - tables
        sample_tokens = (np.cumsum(counts, dtype=np.int32) - 1)[list(sampling)]
        full = ~np.array(greedy, dtype=np.bool_)
        lines = np.where(full, np.cumsum(full) - 1, -1).astype(np.int32)
        logits = torch.empty(int(full.sum()), self._vocab_size, dtype=torch.float32)
        best = np.empty(len(sampling), np.int32)
        batch = BatchStruct(
            rows=len(rows),
            tokens=num_tokens,
            samples=len(sampling),
            starts=_data(starts),
            counts=_data(counts),
            blocks=_data(blocks),
            block_offsets=_data(offsets),
            token_ids=_data(tokens),
            cos=_address(cos),
            sin=_address(sin),
            sample_tokens=_data(sample_tokens),
            sample_lines=_data(lines),
            logits=_address(logits),
            best=_data(best),
        )
        if self._library.tandem_step(self._handle, ctypes.byref(batch)):
            raise MemoryError(f"no memory for a step of {num_tokens} tokens")
        chosen: list[int] = best.tolist()
        return chosen, logits


class _Positions:
    """cos and sin of every position so far, as transformers has them; grows with the contexts."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        self._rotary = Rotary(spec.rope, spec.head_dim, torch.device("cpu"))
        self._half = spec.head_dim // 2
        self._dtype = dtype
        self._most = spec.max_position_embeddings
        self._tables = self._compute(0)

    def up_to(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two float32 tensors [at least `count`, head_dim / 2]."""
        held = len(self._tables[0])
        if count > held:
            wanted = max(FIRST_POSITIONS, 2 * held, count)
            self._tables = self._compute(max(count, min(wanted, self._most)))
        return self._tables

    def _compute(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        cos, signed_sin = self._rotary.tables(torch.arange(count), self._dtype)
        return (
            cos[:, 0, : self._half].float().contiguous(),
            signed_sin[:, 0, self._half :].float().contiguous(),
        )


def _layer_struct(layer: LayerWeights, window: int | None) -> LayerStruct:
    return LayerStruct(
        input_norm=_address(layer.input_norm),
        qkv=matrix_struct(layer.matrix("qkv")),
        qkv_bias=_address(layer.qkv_bias),
        q_norm=_address(layer.q_norm),
        k_norm=_address(layer.k_norm),
        o=matrix_struct(layer.matrix("o")),
        o_bias=_address(layer.o_bias),
        mlp_norm=_address(layer.mlp_norm),
        gate_up=matrix_struct(layer.matrix("gate_up")),
        gate_up_bias=_address(layer.gate_up_bias),
        down=matrix_struct(layer.matrix("down")),
        down_bias=_address(layer.down_bias),
        window=window or 0,
    )


def _address(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous(), tensor.stride()
    return tensor.data_ptr()


def _data(array: npt.NDArray[np.int32]) -> int:
    assert array.dtype == np.int32 and array.flags.c_contiguous
    return array.ctypes.data
