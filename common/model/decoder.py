"""What computes a step: the contract between the runner and its backends, and their choice.

`common.model.native` (C++ kernels, CPU), `common.model.triton.decoder` (GPUs) and
`common.model.torch_decoder` (plain torch, any device) implement it. All leave the same KV in the
pool and the same logits, up to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch

from common.errors import ConfigError
from common.kv.pool import KvPool
from common.model.batch import Row
from common.model.cpu.build import BuildError
from common.model.native import NativeDecoder
from common.model.spec import ModelSpec
from common.model.torch_decoder import TorchDecoder
from common.model.weights import Weights

if TYPE_CHECKING:
    # Only here: a step of a model can be computed where msgspec is not installed.
    from common.model.sampler import DrawRandom

log = logging.getLogger("tandem.kernels")

Kernels = Literal["auto", "native", "triton", "torch"]


class Decoder(Protocol):
    """A model over a pool."""

    @property
    def draw_random(self) -> DrawRandom | None:
        """Random draws by kernels of the backend; None: it has none."""
        ...

    def compute(
        self, rows: Sequence[Row], sampling: Sequence[int], greedy: Sequence[bool]
    ) -> tuple[list[int], torch.Tensor]:
        """Write the KV of all rows, and look at the last token of some.

        sampling: indices of rows; greedy: for each, whether its best token is enough. Returns that
        token for each (meaningless where not greedy), and the logits of the others in their order,
        [others, vocab] float32, which the caller may overwrite.
        """
        ...


class LaunchedRows(Protocol):
    """Rows that are being computed."""

    def collect(self) -> tuple[list[int], torch.Tensor]:
        """Wait for them; gives what `Decoder.compute` gives."""
        ...


@dataclass(frozen=True, slots=True)
class Computed:
    """Rows that are computed already."""

    result: tuple[list[int], torch.Tensor]

    def collect(self) -> tuple[list[int], torch.Tensor]:
        return self.result


@runtime_checkable
class Launching(Decoder, Protocol):
    """A decoder whose device computes while its caller does something else."""

    def launch(
        self, rows: Sequence[Row], sampling: Sequence[int], greedy: Sequence[bool]
    ) -> LaunchedRows:
        """Begin what `compute` does. It must be collected before the next call."""
        ...


def open_decoder(
    spec: ModelSpec, weights: Weights, pool: KvPool, kernels: Kernels, threads: int
) -> Decoder:
    """auto: native on CPU, triton on GPUs, where they can be. Raises BuildError for native kernels
    that cannot be compiled, ConfigError for triton where it is not installed.

    threads: of native kernels; torch has a setting of its own.
    """
    if kernels == "triton" or (kernels == "auto" and weights.device.type == "cuda"):
        try:
            # Here: Triton is an extra, and nobody but a GPU needs it.
            from common.model.triton.decoder import TritonDecoder
        except ImportError as error:
            if kernels == "triton":
                raise ConfigError(f"no Triton for the GPU's kernels: {error}") from error
            log.warning("no GPU kernels, using torch, which is slower: %s", error)
        else:
            return TritonDecoder(spec, weights, pool)
    if kernels == "torch" or not NativeDecoder.supports(spec, weights):
        assert kernels != "native", (spec, weights.dtype, weights.device)
        return TorchDecoder(spec, weights, pool)
    try:
        return NativeDecoder(spec, weights, pool, threads)
    except BuildError as error:
        if kernels == "native":
            raise
        log.warning("no CPU kernels, using torch, which is slower: %s", error)
        return TorchDecoder(spec, weights, pool)
