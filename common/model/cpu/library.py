"""The compiled kernels as Python sees them: `abi.h` in ctypes.

Used by `common.model.native`, the tests of the kernels and their benchmark. Calls release the
interpreter lock while they run.
"""

import ctypes
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Final

import torch

from common.model.cpu.build import NATIVE, build
from common.model.quantize import Matrix

MAX_QUANTIZED_DEPTH: Final = 1 << 16
"""A sum of more products of bytes might not fit 32 bits."""
DTYPE_CODES: Final = {torch.float32: 0, torch.bfloat16: 1}


class MatrixStruct(Structure):
    """`struct tandem_matrix`"""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("bits", c_int32),
        ("group", c_int32),
        ("planes", c_int32),
    )


class LayerStruct(Structure):
    """`struct tandem_layer`"""

    _fields_ = (
        ("qkv", MatrixStruct),
        ("o", MatrixStruct),
        ("gate_up", MatrixStruct),
        ("down", MatrixStruct),
        ("input_norm", c_void_p),
        ("qkv_bias", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("o_bias", c_void_p),
        ("mlp_norm", c_void_p),
        ("gate_up_bias", c_void_p),
        ("down_bias", c_void_p),
        ("window", c_int32),
    )


class ModelStruct(Structure):
    """`struct tandem_model`"""

    _fields_ = (
        ("dtype", c_int32),
        ("threads", c_int32),
        ("vocab", c_int32),
        ("hidden", c_int32),
        ("inner", c_int32),
        ("layers", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("eps", c_float),
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("head", MatrixStruct),
        ("layer", POINTER(LayerStruct)),
        ("pool", c_void_p),
    )


class BatchStruct(Structure):
    """`struct tandem_batch`"""

    _fields_ = (
        ("rows", c_int32),
        ("tokens", c_int32),
        ("samples", c_int32),
        ("starts", c_void_p),
        ("counts", c_void_p),
        ("blocks", c_void_p),
        ("block_offsets", c_void_p),
        ("token_ids", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("sample_tokens", c_void_p),
        ("sample_lines", c_void_p),
        ("logits", c_void_p),
        ("best", c_void_p),
    )


SIGNATURES: Final = {
    "tandem_create": (c_void_p, (POINTER(ModelStruct),)),
    "tandem_destroy": (None, (c_void_p,)),
    "tandem_step": (c_int, (c_void_p, POINTER(BatchStruct))),
    "tandem_linear_create": (
        c_void_p,
        (c_int32, c_int32, POINTER(MatrixStruct), c_int32, c_int32),
    ),
    "tandem_linear_destroy": (None, (c_void_p,)),
    "tandem_linear_apply": (None, (c_void_p, c_void_p, c_int32, c_int32, c_void_p)),
    "tandem_attention_create": (c_void_p, (POINTER(ModelStruct),)),
    "tandem_attention_destroy": (None, (c_void_p,)),
    "tandem_attention_apply": (
        None,
        (c_void_p, *(c_int32,) * 5, c_void_p, c_void_p, c_void_p),
    ),
    "tandem_read": (c_float, (c_void_p, c_int64, c_int32)),
    "tandem_rms_norm": (
        None,
        (c_int32, c_void_p, c_void_p, c_int32, c_int32, c_float, c_void_p),
    ),
    "tandem_rotate": (
        None,
        (c_int32, c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_void_p),
    ),
    "tandem_swiglu": (None, (c_int32, c_void_p, c_void_p, c_int32, c_void_p)),
}


def matrix_struct(matrix: Matrix) -> MatrixStruct:
    """Whoever calls this keeps the matrix as long as the structure is in use."""
    if isinstance(matrix, torch.Tensor):
        assert matrix.is_contiguous(), matrix.stride()
        return MatrixStruct(data=matrix.data_ptr())
    values, scales, scheme = matrix.values, matrix.scales, matrix.scheme
    assert values.dtype == torch.int8 and values.is_contiguous(), values.stride()
    assert scales.dtype == torch.float32 and scales.is_contiguous(), scales.stride()
    assert values.shape[1] <= MAX_QUANTIZED_DEPTH, values.shape
    return MatrixStruct(
        data=values.data_ptr(),
        scales=scales.data_ptr(),
        bits=scheme.bits,
        group=scheme.group or 0,
        planes=scheme.activation_bits // 8,
    )


def load(directory: Path | None = None, target: str = NATIVE) -> ctypes.CDLL:
    """The kernels, compiled if need be, with their signatures. Raises BuildError."""
    library = ctypes.CDLL(str(build(directory, target)))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library
