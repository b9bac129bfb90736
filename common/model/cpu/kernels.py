"""Each kernel alone, over torch tensors: for the tests and the benchmark of the kernels.

A model never uses these; it computes whole steps (`common.model.native`).
"""

import ctypes
import weakref

import torch

from common.model.cpu.library import DTYPE_CODES, ModelStruct, matrix_struct
from common.model.quantize import Matrix, QuantizedMatrix

ALIGNMENT = 32
"""Columns of activations are padded with zeros to a multiple of this."""


def padded(x: torch.Tensor) -> torch.Tensor:
    """[rows, columns] with zeros up to the alignment, contiguous."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % ALIGNMENT)).contiguous()


class Linear:
    """`a @ weight.T` over packed weights."""

    def __init__(self, library: ctypes.CDLL, weight: Matrix, threads: int = 1) -> None:
        """weight: [columns, depth], contiguous."""
        self._library = library
        shape = weight.values.shape if isinstance(weight, QuantizedMatrix) else weight.shape
        self._columns, self._depth = shape
        self._handle = library.tandem_linear_create(
            DTYPE_CODES[weight.dtype],
            threads,
            ctypes.byref(matrix_struct(weight)),
            self._columns,
            self._depth,
        )
        if not self._handle:
            raise MemoryError("no memory for the packed weights")
        weakref.finalize(self, library.tandem_linear_destroy, self._handle)

    def output(self, rows: int) -> torch.Tensor:
        return torch.empty(rows, -(-self._columns // ALIGNMENT) * ALIGNMENT)

    def apply(self, a: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        """a: [rows, depth], padded; to: `output(rows)`. Returns [rows, columns] float32."""
        assert a.is_contiguous() and a.shape[1] % ALIGNMENT == 0, a.shape
        self._library.tandem_linear_apply(
            self._handle, a.data_ptr(), len(a), self._depth, to.data_ptr()
        )
        return to[:, : self._columns]


class Attention:
    """Attention of one thread over a pool `[num_blocks, layer, 2, kv_head, slot, head_dim]`."""

    def __init__(self, library: ctypes.CDLL, pool: torch.Tensor, group: int) -> None:
        """group: query heads that share a kv head."""
        _, layers, _, kv_heads, block_size, head_dim = pool.shape
        model = ModelStruct(
            dtype=DTYPE_CODES[pool.dtype],
            layers=layers,
            heads=kv_heads * group,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            pool=pool.data_ptr(),
        )
        self._library = library
        self._pool = pool
        self._handle = library.tandem_attention_create(ctypes.byref(model))
        if not self._handle:
            raise MemoryError("no memory for attention")
        weakref.finalize(self, library.tandem_attention_destroy, self._handle)

    def apply(
        self,
        queries: torch.Tensor,
        blocks: torch.Tensor,
        *,
        layer: int,
        kv_head: int,
        start: int,
        window: int | None = None,
    ) -> torch.Tensor:
        """queries: [tokens, group, head_dim] from position `start` on, whose keys and values are
        in the pool already; blocks: int32. Returns the same shape."""
        assert queries.is_contiguous() and blocks.dtype == torch.int32
        to = torch.empty_like(queries)
        self._library.tandem_attention_apply(
            self._handle,
            layer,
            window or 0,
            kv_head,
            start,
            len(queries),
            blocks.data_ptr(),
            queries.data_ptr(),
            to.data_ptr(),
        )
        return to


def read(library: ctypes.CDLL, memory: torch.Tensor, threads: int) -> float:
    """The sum of a float32 vector: nothing but reading. Its length divides by 64 * threads."""
    assert memory.dtype == torch.float32 and memory.numel() % (64 * threads) == 0, memory.shape
    total: float = library.tandem_read(memory.data_ptr(), memory.numel(), threads)
    return total


def rms_norm(
    library: ctypes.CDLL, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """x: [rows, columns] float32. Returns it in `dtype`."""
    count = x.shape[1]
    x, weight = padded(x), padded(weight[None])
    to = torch.empty(x.shape, dtype=dtype)
    library.tandem_rms_norm(
        DTYPE_CODES[dtype],
        x.data_ptr(),
        weight.data_ptr(),
        len(x),
        count,
        eps,
        to.data_ptr(),
    )
    return to[:, :count]


def rotate(
    library: ctypes.CDLL,
    heads: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """heads: [count, head_dim] float32 of one token; cos, sin: [head_dim / 2]. Returns them in
    `dtype`."""
    to = torch.empty(heads.shape, dtype=dtype)
    library.tandem_rotate(
        DTYPE_CODES[dtype],
        heads.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        *heads.shape,
        to.data_ptr(),
    )
    return to


def swiglu(
    library: ctypes.CDLL, gate: torch.Tensor, up: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """silu(gate) * up of vectors float32 whose length is a multiple of 16."""
    assert len(gate) % 16 == 0, gate.shape
    to = torch.empty(len(gate), dtype=dtype)
    library.tandem_swiglu(
        DTYPE_CODES[dtype], gate.data_ptr(), up.data_ptr(), len(gate), to.data_ptr()
    )
    return to
