"""The parameters of one model, in the form in which the decoder uses them.

`load_weights` reads a checkpoint once, at the start of a worker; q, k and v become one matrix,
and so do gate and up, so that a layer has four matrix products.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from common.model.checkpoint import Checkpoint
from common.model.progress import ProgressBar
from common.model.quantize import HEAD_SCHEME, Matrix, QuantizedMatrix, Scheme, quantize
from common.model.spec import ModelSpec

MatrixName = Literal["qkv", "o", "gate_up", "down"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLayer:
    """The matrices of one decoder layer, in place of those in `LayerWeights`."""

    qkv: QuantizedMatrix
    o: QuantizedMatrix
    gate_up: QuantizedMatrix
    down: QuantizedMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer. Matrices are [out, in], as `torch.nn.functional.linear` takes them."""

    input_norm: torch.Tensor
    """[hidden]"""
    qkv: torch.Tensor
    """[(heads + 2 * kv_heads) * head_dim, hidden]: q heads, then k heads, then v heads."""
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    """[head_dim]"""
    k_norm: torch.Tensor | None
    """[head_dim]"""
    o: torch.Tensor
    """[hidden, heads * head_dim]"""
    o_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    """[hidden]"""
    gate_up: torch.Tensor
    """[2 * intermediate, hidden]: gate, then up."""
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    """[hidden, intermediate]"""
    down_bias: torch.Tensor | None
    quantized: QuantizedLayer | None = None
    """If there, the four matrices above are empty."""

    def matrix(self, name: MatrixName) -> Matrix:
        """One of the four, of either kind."""
        matrix: Matrix = getattr(self.quantized or self, name)
        return matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """All parameters of a model, of one dtype, on one device."""

    embedding: torch.Tensor
    """[vocab, hidden]"""
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    """[hidden]"""
    head: torch.Tensor
    """[vocab, hidden]; the embedding itself where the two are tied; empty if `quantized_head`."""
    quantized_head: QuantizedMatrix | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device


def load_weights(
    directory: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    scheme: Scheme | None = None,
) -> Weights:
    """Read the safetensors of `directory` into `dtype` on `device`, with a progress bar on stderr
    where that is a terminal. scheme: quantise the matrices layer by layer, and the head.

    Raises ModelError, in one line, for a missing or corrupt file and for a tensor that is missing,
    of the wrong shape or quantized.
    """
    with (
        Checkpoint(directory) as checkpoint,
        ProgressBar(f"loading {directory.name}", spec.num_layers + 1) as bar,
    ):
        reader = _Reader(checkpoint, dtype, device)
        layers: list[LayerWeights] = []
        for index in range(spec.num_layers):
            layer = _read_layer(reader, spec, f"model.layers.{index}")
            layers.append(layer if scheme is None else _quantize_layer(layer, scheme))
            bar.advance()
        vocabulary = (spec.vocab_size, spec.hidden_size)
        embedding = reader.one("model.embed_tokens.weight", vocabulary)
        norm = reader.one("model.norm.weight", (spec.hidden_size,))
        head = embedding if spec.tie_word_embeddings else reader.one("lm_head.weight", vocabulary)
        bar.advance()
    weights = Weights(embedding=embedding, layers=tuple(layers), norm=norm, head=head)
    return weights if scheme is None else _quantize_head(weights)


def quantize_weights(weights: Weights, scheme: Scheme) -> Weights:
    """The same model with its matrices quantised. The embedding stays as it is."""
    layers = tuple(_quantize_layer(layer, scheme) for layer in weights.layers)
    return _quantize_head(replace(weights, layers=layers))


def _quantize_layer(layer: LayerWeights, scheme: Scheme) -> LayerWeights:
    empty = layer.qkv.new_empty(0)
    return replace(
        layer,
        qkv=empty,
        o=empty,
        gate_up=empty,
        down=empty,
        quantized=QuantizedLayer(
            qkv=quantize(layer.qkv, scheme),
            o=quantize(layer.o, scheme),
            gate_up=quantize(layer.gate_up, scheme),
            down=quantize(layer.down, scheme),
        ),
    )


def _quantize_head(weights: Weights) -> Weights:
    head = quantize(weights.head, HEAD_SCHEME)
    return replace(weights, head=weights.head.new_empty(0), quantized_head=head)


class _Reader:
    """Reads tensors of a checkpoint into one dtype on one device."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device

    def one(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        # Always a copy: a tensor that still maps the file would die with a replaced checkpoint.
        target = torch.empty(shape, dtype=self._dtype, device=self._device)
        return target.copy_(self._checkpoint.read(name, shape))

    def stacked(self, parts: list[tuple[str, int]], *rest: int) -> torch.Tensor:
        """The tensors `parts`, (name, rows) each, one under another: [sum of rows, *rest]."""
        total = sum(rows for _, rows in parts)
        target = torch.empty((total, *rest), dtype=self._dtype, device=self._device)
        start = 0
        for name, rows in parts:
            target[start : start + rows].copy_(self._checkpoint.read(name, (rows, *rest)))
            start += rows
        return target


def _read_layer(reader: _Reader, spec: ModelSpec, prefix: str) -> LayerWeights:
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def qkv(kind: str, *rest: int) -> torch.Tensor:
        parts = [
            (f"{attention}.q_proj.{kind}", q_size),
            (f"{attention}.k_proj.{kind}", kv_size),
            (f"{attention}.v_proj.{kind}", kv_size),
        ]
        return reader.stacked(parts, *rest)

    def gate_up(kind: str, *rest: int) -> torch.Tensor:
        parts = [(f"{mlp}.gate_proj.{kind}", inner), (f"{mlp}.up_proj.{kind}", inner)]
        return reader.stacked(parts, *rest)

    head_norm = (spec.head_dim,)
    return LayerWeights(
        input_norm=reader.one(f"{prefix}.input_layernorm.weight", (hidden,)),
        qkv=qkv("weight", hidden),
        qkv_bias=qkv("bias") if spec.qkv_bias else None,
        q_norm=reader.one(f"{attention}.q_norm.weight", head_norm) if spec.qk_norm else None,
        k_norm=reader.one(f"{attention}.k_norm.weight", head_norm) if spec.qk_norm else None,
        o=reader.one(f"{attention}.o_proj.weight", (hidden, q_size)),
        o_bias=reader.one(f"{attention}.o_proj.bias", (hidden,)) if spec.o_bias else None,
        mlp_norm=reader.one(f"{prefix}.post_attention_layernorm.weight", (hidden,)),
        gate_up=gate_up("weight", hidden),
        gate_up_bias=gate_up("bias") if spec.mlp_bias else None,
        down=reader.one(f"{mlp}.down_proj.weight", (hidden, inner)),
        down_bias=reader.one(f"{mlp}.down_proj.bias", (hidden,)) if spec.mlp_bias else None,
    )
