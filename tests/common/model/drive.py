"""Runs a `ModelRunner` as an engine would, with scattered blocks and odd chunks.

Small on purpose: no queue, no eviction. Prompts arrive while others decode, so that most steps
mix prefill chunks with decode rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random

import torch

from common.kv.pool import KvPool
from common.model.batch import Row, Sample, Sampled
from common.model.decoder import Kernels
from common.model.load import Loaded, open_model
from common.model.runner import ModelRunner
from common.sampling import SamplingParams


@dataclass(slots=True)
class Run:
    """One sequence on its way through the runner."""

    prompt_len: int
    tokens: list[int]
    params: SamplingParams
    choice: int = 0
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    results: list[Sampled] = field(default_factory=list)

    @property
    def outputs(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def done(self) -> bool:
        return len(self.outputs) >= self.params.max_tokens

    def row(self, num_tokens: int) -> Row:
        end = self.num_computed + num_tokens
        samples: tuple[Sample, ...] = ()
        if end == len(self.tokens):
            samples = (Sample(self.choice, self.params, self.tokens, self.prompt_len),)
        return Row(self.tokens[self.num_computed : end], self.num_computed, self.blocks, samples)


class Driver:
    """A runner with its pool; every slot that holds no token is NaN whenever a step begins."""

    def __init__(
        self,
        loaded: Loaded,
        *,
        block_size: int = 16,
        num_blocks: int,
        seed: int = 0,
        kernels: Kernels = "auto",
        threads: int = 1,
    ) -> None:
        self.layout = loaded.spec.layout(block_size, loaded.dtype_name)
        self.pool = KvPool(self.layout, num_blocks, poison=True)
        self.runner = ModelRunner(
            loaded.spec, loaded.weights, self.pool, kernels=kernels, threads=threads
        )
        self._random = Random(seed)
        self._free = list(range(num_blocks))
        self._random.shuffle(self._free)

    def take_block(self) -> int:
        """A block that nothing else of this driver uses."""
        return self._free.pop()

    def start(
        self, prompt: Sequence[int], params: SamplingParams, *, shared: Run | None = None
    ) -> Run:
        """A new sequence; with `shared`, its full blocks of the common prefix are used again."""
        run = Run(len(prompt), list(prompt), params)
        if shared is not None:
            equal = next(
                i for i in count() if i >= len(prompt) - 1 or prompt[i] != shared.tokens[i]
            )
            full = min(equal, shared.num_computed) // self.layout.block_size
            run.blocks = shared.blocks[:full]
            run.num_computed = full * self.layout.block_size
        needed = self.layout.blocks_for(len(prompt) + params.max_tokens)
        run.blocks += [self.take_block() for _ in range(needed - len(run.blocks))]
        return run

    def step(self, runs: Sequence[Run], counts: Sequence[int]) -> None:
        """One step in which each run computes that many of its pending tokens."""
        rows = [run.row(number) for run, number in zip(runs, counts, strict=True)]
        for run, row, sampled in zip(runs, rows, self.runner.step(rows), strict=True):
            run.num_computed += len(row.tokens)
            assert len(sampled) == len(row.samples)
            for item in sampled:
                run.results.append(item)
                run.tokens.append(item.token)

    def finish(self, runs: Sequence[Run], *, budget: int = 100) -> None:
        """Run all to their end; each step takes prefill chunks of odd sizes up to `budget`."""
        waiting = list(runs)
        active: list[Run] = []
        while waiting or active:
            active += waiting[:3]
            del waiting[:3]
            self._random.shuffle(active)
            counts = []
            left = budget
            for run in active:
                pending = len(run.tokens) - run.num_computed
                number = min(pending, self._random.randint(1, max(left, 1)))
                counts.append(number)
                left -= number
            self.step(active, counts)
            active = [run for run in active if not run.done]


def load(directory: Path, dtype: str = "float32") -> Loaded:
    return open_model(str(directory), None, dtype, torch.device("cpu"))


def greedy_params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def run_greedy(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    block_size: int = 16,
    kernels: Kernels = "auto",
) -> list[list[int]]:
    """Greedy continuations of all prompts, run concurrently."""
    num_blocks = sum(-(-(len(prompt) + max_tokens) // block_size) for prompt in prompts)
    driver = Driver(loaded, block_size=block_size, num_blocks=num_blocks, kernels=kernels)
    runs = [driver.start(prompt, greedy_params(max_tokens)) for prompt in prompts]
    driver.finish(runs)
    return [run.outputs for run in runs]


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    random = Random(seed)
    return [[random.randrange(vocab_size) for _ in range(length)] for length in lengths]
