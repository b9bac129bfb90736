"""Cost models that are fitted to measurements of a known worker."""

from random import Random

import pytest

from common.cost import PRIOR, CostModel
from common.cost_fit import CostFit, LeastSquares

GPU = CostModel(
    prefill_s=0.012, token_s=5e-5, pair_s=8.3e-10, step_s=0.008, row_s=3e-5, kv_s=1.2e-8
)
CPU = CostModel(prefill_s=0.02, token_s=2e-3, pair_s=4e-8, step_s=0.03, row_s=2e-3, kv_s=1e-6)
PROMPTS = [(16, 0), (500, 0), (500, 4000), (3000, 0), (8000, 8000), (20_000, 0)]


def error(fitted: CostModel, real: CostModel) -> float:
    """The largest relative error over prompts of every size."""
    return max(abs(fitted.prefill(*p) / real.prefill(*p) - 1) for p in PROMPTS)


def learn(fit: CostFit, real: CostModel, count: int, rng: Random, noise: float = 0.05) -> None:
    for _ in range(count):
        new, cached = int(10 ** rng.uniform(1, 4.3)), rng.choice([0, 0, 1000, 8000])
        fit.saw_prefill(new, cached, real.prefill(new, cached) * rng.gauss(1, noise))


@pytest.mark.parametrize("real", [GPU, CPU])
def test_a_minute_of_traffic_is_enough(real: CostModel) -> None:
    fit = CostFit()
    learn(fit, real, 120, Random(1))
    assert fit.num_prefills == 120
    assert error(fit.model, real) < 0.15


def test_steps() -> None:
    fit, rng = CostFit(), Random(2)
    for _ in range(300):
        batch, kv = rng.randrange(1, 64), rng.randrange(100, 500_000)
        fit.saw_step(batch, kv, GPU.step(batch, kv) * rng.gauss(1, 0.05))
    for batch, kv in ((1, 100), (32, 100_000), (60, 400_000)):
        assert fit.model.step(batch, kv) == pytest.approx(GPU.step(batch, kv), rel=0.1)
    assert fit.model.token_s == pytest.approx(PRIOR.token_s)


def test_outliers_move_little() -> None:
    fit, rng = CostFit(), Random(3)
    learn(fit, GPU, 100, rng)
    for _ in range(100):
        if rng.random() < 0.1:  # a pause of the process
            fit.saw_prefill(1000, 0, 30.0)
        learn(fit, GPU, 1, rng)
    assert error(fit.model, GPU) < 0.3


def test_a_lasting_change_is_followed() -> None:
    fit, rng = CostFit(), Random(4)
    learn(fit, GPU, 300, rng)
    slower = CostModel(prefill_s=0.03, token_s=1.5e-4, pair_s=2.5e-9)
    learn(fit, slower, 600, rng)
    assert error(fit.model, slower) < 0.25


def test_one_kind_of_prompt_leaves_the_rest_to_the_prior() -> None:
    fit = CostFit(GPU)
    for _ in range(5000):
        fit.saw_prefill(1000, 0, 2 * GPU.prefill(1000, 0))
    assert fit.model.prefill(1000, 0) == pytest.approx(2 * GPU.prefill(1000, 0), rel=0.01)
    assert min(fit.model.prefill_s, fit.model.token_s, fit.model.pair_s) > 0
    assert fit.model.prefill(2000, 0) == pytest.approx(2 * GPU.prefill(2000, 0), rel=0.3)


def test_nothing_is_learnt_from_what_is_no_measurement() -> None:
    fit = CostFit()
    fit.saw_prefill(100, 0, 0.0)
    fit.saw_prefill(100, 0, -1.0)
    assert fit.num_prefills == 0 and fit.model == PRIOR
    plain = LeastSquares((1.0, 1.0))
    plain.add((0.0, 0.0), 5.0)
    assert plain.coefficients == [1.0, 1.0] and plain.count == 0


def test_a_bound_leaves_what_was_measured() -> None:
    fit = LeastSquares((1.0, 1.0))
    for _ in range(50):
        fit.add((1.0, 1.0), 1.0)
    # With the others this asks for a first coefficient far below 0.
    fit.add((1.0, 3.0), 10.0)
    assert fit.coefficients[0] < 0.01
    assert fit.predict((1.0, 1.0)) == pytest.approx(1.0, rel=0.05)


def test_steps_of_one_kind_are_forgotten_too() -> None:
    fit, rng = CostFit(), Random(5)
    for seconds, count in ((0.013, 1500), (0.003, 400)):
        for _ in range(count):
            fit.saw_step(1, rng.randrange(100, 200), seconds * rng.gauss(1, 0.05))
    assert fit.model.step(1, 150) == pytest.approx(0.003, rel=0.1)


def test_what_seemed_to_cost_nothing_may_turn_out_to() -> None:
    fit, rng = CostFit(CostModel(step_s=0.003, row_s=1e-12, kv_s=1e-14)), Random(7)
    real = CostModel(step_s=0.002, row_s=5e-4, kv_s=1e-8)
    for _ in range(300):
        batch = rng.randrange(1, 32)
        fit.saw_step(batch, 500 * batch, real.step(batch, 500 * batch))
    for batch in (1, 30):
        wanted = real.step(batch, 500 * batch)
        assert fit.model.step(batch, 500 * batch) == pytest.approx(wanted, rel=0.1)
