"""The backend for GPUs: a step as a sequence of Triton kernels and library matrix products.

Made by `common.model.decoder` on CUDA devices, and on CPU where Triton interprets its kernels.
Steps that are plain decode run as one CUDA graph per batch bucket. `launch` only enqueues a step
and `Launched.collect` waits for its tokens, so that a caller may prepare the next step meanwhile;
`compute` is both in a row.

Attention and all row-wise kernels give a row the same bits in every batch. With
`batch_invariant` the matrix products and rows of one token use one kernel whatever the batch is,
too, and then a token's bits depend on nothing but its own context.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

import torch
import triton
from torch.nn.functional import embedding
from torch.nn.functional import linear as library_linear

from common.kv.pool import KvPool
from common.model.batch import Row, Sample
from common.model.rope import Rotary
from common.model.spec import ModelSpec
from common.model.triton.decode import SPLIT, Workspace, decode_attention
from common.model.triton.graphs import BUCKETS, DecodeGraphs, HostBuffers
from common.model.triton.inputs import Packed, Step, pack
from common.model.triton.linear import linear
from common.model.triton.prefill import prefill_attention, tokens_per_tile
from common.model.triton.rope import Pages, rope_store
from common.model.triton.rows import add_rms_norm, rms_norm, swiglu
from common.model.triton.sampling import Draw, best_tokens, draw_tokens
from common.model.triton.tuning import tuning_for
from common.model.weights import LayerWeights, Weights

PROGRAMS_PER_PROCESSOR: Final = 4
"""Of decode attention, about: enough of them in flight to keep the memory busy."""
DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Launched:
    """A step under way."""

    best: torch.Tensor | None
    """[lines] int32 on the device; None if no row wants its best token."""
    logits: torch.Tensor
    """[lines, vocab] in the dtype of the model."""
    lines: tuple[int, ...]
    """Line of each sampled row."""
    full: tuple[int, ...]
    """Lines of the rows that want all of their logits."""

    def collect(self) -> tuple[list[int], torch.Tensor]:
        """Wait, and give what `Decoder.compute` gives."""
        best = [0] * len(self.lines)
        if self.best is not None:
            tokens: list[int] = self.best.tolist()
            best = [tokens[line] for line in self.lines]
        if not self.full:
            return best, self.logits.new_empty(0, self.logits.shape[1], dtype=torch.float32)
        wanted = torch.tensor(self.full, dtype=torch.int64).to(self.logits.device)
        return best, self.logits[wanted].float()


class TritonDecoder:
    """A `common.model.decoder.Decoder`."""

    @staticmethod
    def supports(spec: ModelSpec, weights: Weights) -> bool:
        """`weights` are on a GPU, or Triton interprets its kernels."""
        return weights.dtype in DTYPES and (
            weights.device.type == "cuda" or triton.knobs.runtime.interpret
        )

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        pool: KvPool,
        *,
        graphs: bool = True,
        batch_invariant: bool = False,
    ) -> None:
        """graphs: capture decode steps (only on CUDA). batch_invariant: see the module."""
        assert self.supports(spec, weights), (weights.dtype, weights.device)
        device = weights.device
        self._device = device
        self._spec = spec
        self._weights = weights
        self._pool = pool
        self._block_size = pool.layout.block_size
        self._invariant = batch_invariant
        tuning = tuning_for(device)
        bytes_each = weights.dtype.itemsize
        self._prefill_shape = tuning.shape("prefill", spec.head_dim, bytes_each)
        self._decode_shape = tuning.shape("decode", spec.head_dim, bytes_each)
        self._linear_shape = tuning.shape("linear", element_bytes=bytes_each)
        self._per_tile = tokens_per_tile(self._prefill_shape, spec.num_heads // spec.num_kv_heads)
        self._pages = [Pages.of(pool.tensor, layer) for layer in range(spec.num_layers)]
        cos, sin = Rotary(spec.rope, spec.head_dim, device).tables(
            torch.arange(spec.max_position_embeddings, device=device), weights.dtype
        )
        half = spec.head_dim // 2
        self._tables = cos[:, 0, :half].contiguous(), sin[:, 0, half:].contiguous()
        tokens = pool.num_blocks * self._block_size
        self._workspace = self._new_workspace(-(-tokens // SPLIT) + BUCKETS[-1])
        cuda = device.type == "cuda"
        processors = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
        self._programs = processors * PROGRAMS_PER_PROCESSOR
        self._host = HostBuffers(device)
        self._graphs = (
            DecodeGraphs(self._host, pool.num_blocks)
            if cuda and graphs and not batch_invariant
            else None
        )

    def compute(
        self, rows: Sequence[Row], sampling: Sequence[int], greedy: Sequence[bool]
    ) -> tuple[list[int], torch.Tensor]:
        return self.launch(rows, sampling, greedy).collect()

    @torch.inference_mode()
    def launch(
        self, rows: Sequence[Row], sampling: Sequence[int], greedy: Sequence[bool]
    ) -> Launched:
        """Enqueue a step; its `Launched` must be collected before the next one is launched."""
        with self._on_device():
            return self._launch(rows, sampling, greedy)

    def draw_random(self, logits: torch.Tensor, samples: Sequence[Sample]) -> list[int]:
        """One token per line of logits [samples, vocab] float32; see `common.model.sampler`."""
        draws = [
            Draw(
                temperature=sample.params.temperature,
                min_p=sample.params.min_p,
                top_k=sample.params.top_k,
                top_p=sample.params.top_p,
                seed=sample.params.seed,
                choice=sample.choice,
                index=len(sample.tokens) - sample.prompt_len,
            )
            for sample in samples
        ]
        with self._on_device():
            tokens: list[int] = draw_tokens(logits, draws).tolist()
        return tokens

    def _on_device(self) -> AbstractContextManager[object]:
        """Triton launches on the current device of this thread, which need not be the model's."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _launch(
        self, rows: Sequence[Row], sampling: Sequence[int], greedy: Sequence[bool]
    ) -> Launched:
        for row in rows:
            # The kernels index with these: what is wrong here would read or write foreign memory.
            assert 0 <= min(row.blocks) and max(row.blocks) < self._pool.num_blocks, "foreign block"
            assert 0 <= min(row.tokens) and max(row.tokens) < self._spec.vocab_size, "no such token"
            end = row.start + len(row.tokens)
            assert end <= self._spec.max_position_embeddings, (end, "positions")
        wants_best = any(greedy)
        if self._graphs is not None and all(len(row.tokens) == 1 for row in rows):
            result = self._graphs.run(rows, self._block_size, self._workspace.parts, self._forward)
            if result is not None:
                best, logits = result
                full = tuple(i for i, enough in zip(sampling, greedy, strict=True) if not enough)
                return Launched(best if wants_best else None, logits, tuple(sampling), full)
        packed = pack(rows, sampling, self._block_size, self._per_tile, invariant=self._invariant)
        step = self._to_device(packed)
        logits = self._forward(step)
        full = tuple(i for i, enough in enumerate(greedy) if not enough)
        best_of = best_tokens(logits) if wants_best else None
        return Launched(best_of, logits, tuple(range(len(sampling))), full)

    def _to_device(self, packed: Packed) -> Step:
        count = len(packed.numbers)
        target = torch.empty(count, dtype=torch.int32, device=self._weights.device)
        self._host.copy(packed.numbers, target)
        return Step.of(target, packed)

    def _new_workspace(self, parts: int) -> Workspace:
        spec = self._spec
        return Workspace(parts, spec.num_heads, spec.head_dim, self._weights.device)

    def _forward(self, step: Step) -> torch.Tensor:
        """The KV of all tokens into the pool; logits [len(step.samples), vocab]."""
        spec, weights = self._spec, self._weights
        # Rows that share blocks may need more parts than the pool has tokens for.
        enough = step.num_parts <= self._workspace.parts
        workspace = self._workspace if enough else self._new_workspace(step.num_parts)
        x = embedding(step.tokens, weights.embedding)
        h = rms_norm(x, weights.layers[0].input_norm, spec.rms_norm_eps)
        for index, layer in enumerate(weights.layers):
            attended = self._attention(index, layer, h, step, workspace)
            h = add_rms_norm(attended, x, layer.mlp_norm, spec.rms_norm_eps)
            gate_up = self._linear(h, layer.gate_up, layer.gate_up_bias)
            down = self._linear(swiglu(gate_up), layer.down, layer.down_bias)
            if index + 1 < spec.num_layers:
                norm = weights.layers[index + 1].input_norm
                h = add_rms_norm(down, x, norm, spec.rms_norm_eps)
        if not len(step.samples):
            return x.new_empty(0, spec.vocab_size)
        last = down[step.samples], x[step.samples]
        return self._linear(
            add_rms_norm(*last, weights.norm, spec.rms_norm_eps), weights.head, None
        )

    def _attention(
        self, index: int, layer: LayerWeights, h: torch.Tensor, step: Step, workspace: Workspace
    ) -> torch.Tensor:
        spec, pages = self._spec, self._pages[index]
        window = spec.windows[index]
        norms = None
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = (layer.q_norm, layer.k_norm)
        qkv = self._linear(h, layer.qkv, layer.qkv_bias)
        queries = rope_store(
            qkv, pages, step.slots, step.positions, self._tables, norms, spec.rms_norm_eps
        )
        out = torch.empty_like(queries)
        if len(step.lengths):
            decode_attention(
                queries,
                out,
                pages,
                step.blocks,
                step.decode_tables,
                step.lengths,
                step.part_starts,
                workspace,
                window,
                self._decode_shape,
                self._lanes(len(step.lengths)),
            )
        if len(step.tile_rows):
            prefill_attention(
                queries,
                out,
                pages,
                step.blocks,
                step.table_starts,
                step.row_starts,
                step.row_tokens,
                step.row_counts,
                step.tile_rows,
                step.tile_firsts,
                window,
                self._prefill_shape,
            )
        return self._linear(out.view(len(out), -1), layer.o, layer.o_bias)

    def _lanes(self, rows: int) -> int:
        """Programs that share a row's context; changes no result."""
        most = -(-self._spec.max_position_embeddings // SPLIT)
        return max(1, min(most, -(-self._programs // (rows * self._spec.num_kv_heads))))

    def _linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if self._invariant:
            return linear(x, weight, bias, self._linear_shape)
        return library_linear(x, weight, bias)
