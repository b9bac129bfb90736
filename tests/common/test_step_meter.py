"""What a worker measures of its own steps."""

from random import Random

import pytest

from common.blockhash import pack_tokens
from common.cost import PRIOR, CostModel
from common.messages import Prefill
from common.sampling import SamplingParams
from common.schedule import Chunk, to_sequence
from common.step_meter import KNOWN, StepMeter
from tests.stub import stub_limits

LIMITS = stub_limits(8, max_model_len=5_000)
REAL = CostModel(prefill_s=0.01, token_s=4e-4, pair_s=3e-8, step_s=0.02, row_s=1e-3, kv_s=2e-7)


def chunk(computed: int, count: int) -> Chunk:
    """The next `count` tokens of a sequence of which `computed` are computed."""
    tokens = [7] * (computed + count)
    work = Prefill(
        request=1, attempt=1, tokens=pack_tokens(tokens), prompt_len=len(tokens), choices=(0,),
        params=SamplingParams(max_tokens=10),
    )  # fmt: skip
    sequence = to_sequence(work, b"r", LIMITS)
    sequence.num_computed = computed
    return Chunk(sequence, count)


def seconds(batch: list[Chunk]) -> float:
    """What the worker that `REAL` describes takes."""
    rows = [c.sequence.num_computed for c in batch if c.count == 1]
    chunks = [(c.count, c.sequence.num_computed) for c in batch if c.count > 1]
    took = REAL.step(len(rows), sum(rows)) if rows else 0.0
    if chunks:
        took += REAL.prefill_s
    return took + sum(n * (REAL.token_s + REAL.pair_s * (at + n / 2)) for n, at in chunks)


def test_steps_of_every_kind_teach() -> None:
    meter, rng = StepMeter(), Random(1)
    assert meter.costs.model == PRIOR
    for number in range(600):
        rows = [chunk(rng.randrange(10, 4_000), 1) for _ in range(rng.randrange(1, 30))]
        prompts = [
            chunk(rng.choice([0, 500, 3_000]), rng.randrange(16, 512))
            for _ in range(rng.randrange(1, 3))
        ]
        batch = [rows, prompts, [*rows, *prompts]][number % 3]
        meter.saw(batch, seconds(batch))
    costs = meter.costs
    assert (costs.num_steps, costs.num_prefills) == (200, 400 - (KNOWN - 1))
    for new, cached in ((16, 0), (300, 0), (500, 3_000)):
        assert costs.model.prefill(new, cached) == pytest.approx(REAL.prefill(new, cached), rel=0.1)
    for batch_size, kv_tokens in ((1, 50), (8, 20_000), (30, 90_000)):
        wanted = REAL.step(batch_size, kv_tokens)
        assert costs.model.step(batch_size, kv_tokens) == pytest.approx(wanted, rel=0.1)


def test_a_mixed_step_teaches_nothing_before_its_rows_are_known() -> None:
    meter = StepMeter()
    meter.saw([chunk(100, 1), chunk(0, 64)], 1.0)
    assert (meter.costs.num_steps, meter.costs.num_prefills) == (0, 0)
