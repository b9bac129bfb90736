"""Looks for tile shapes that beat the table: `python -m benchmarks.gpu --tune`.

Prints, per kernel and head size, every candidate that compiles with its time, best first, and the
entry for `common/model/triton/tuning.json`. Nothing is written: a table is changed by a commit.
"""

import json
from collections.abc import Callable, Iterator
from itertools import product
from typing import Final

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from benchmarks.cuda.cases import Attention, Heads, make_problem
from benchmarks.cuda.measure import median_s
from common.model.triton.tuning import Shape, tuning_for

_ROUNDS: Final = 5


def tune(device: torch.device) -> int:
    """Both attention kernels for head sizes 64 and 128, in bfloat16; a few minutes."""
    tuning = tuning_for(device)
    print(f"table {tuning.name}, timed: {tuning.timed}", flush=True)
    for dim in (64, 128):
        heads = Heads(32, 8, dim)
        decode = make_problem([(8191, 1)] * 32, heads, device, dtype=torch.bfloat16)
        prefill = make_problem([(0, 8192)], heads, device, dtype=torch.bfloat16)
        for kernel, problem in (("decode", decode), ("prefill", prefill)):

            def prepare(
                shape: Shape, kernel: str = kernel, problem: object = problem
            ) -> Callable[[], object]:
                attention = Attention(problem, shape, decode=kernel == "decode", lanes=4)  # type: ignore[arg-type]
                return lambda: attention.run(0)

            found = sorted(_times(device, kernel, prepare), key=lambda pair: pair[0])
            known = tuning.shape(kernel, dim)
            for seconds, shape in found:
                mark = "  <- table" if shape == known else ""
                print(f"{kernel} {dim}: {seconds * 1e6:8.1f} us  {shape}{mark}", flush=True)
            if found:
                entry = {name: getattr(found[0][1], name) for name in Shape.__slots__}
                print(f'"{dim}x2": {json.dumps(entry)}', flush=True)
    return 0


def _times(
    device: torch.device, kernel: str, prepare: Callable[[Shape], Callable[[], object]]
) -> Iterator[tuple[float, Shape]]:
    lines = (64, 128) if kernel == "prefill" else (16,)
    warps = (4, 8) if kernel == "prefill" else (2, 4, 8)
    for shape in (Shape(*sizes) for sizes in product(lines, (32, 64, 128), warps, (1, 2, 3, 4))):
        try:
            yield median_s([prepare(shape)], device, _ROUNDS), shape
        except (CompilationError, OutOfResources) as error:
            print(f"{kernel}: {shape}: {str(error).splitlines()[0][:80]}", flush=True)
