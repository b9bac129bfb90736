"""Cost models fitted to what is measured: recursive least squares with a prior, one observation
at a time. Owned by `router.fleet`, one for each worker and one for all of a role, and by
`common.step_meter` in each worker.

Errors count relative to the prediction, so that short prompts teach as much as long ones. An
observation further off than a few typical errors pulls only as hard as one at that distance
(Huber's loss): a pause of the process moves nothing, a lasting change moves the fit by and by,
for old observations are forgotten.
"""

from collections.abc import Sequence
from typing import Final

from common.cost import PRIOR, CostModel

FORGET: Final = 0.99
"""Weight of everything known when one more observation comes: about the last hundred count."""
CLIP: Final = 3.0
"""Typical errors beyond which an observation pulls no harder."""
DOUBT: Final = 10000.0
"""Variance of a coefficient relative to the square of its prior, before anything is known, and the
most that forgetting makes of it."""


class LeastSquares:
    """`y = sum(c_i * x_i)` with coefficients `c_i >= 0`."""

    def __init__(self, prior: Sequence[float]) -> None:
        """`prior`: positive coefficients, one for each `x_i`."""
        self._scale = list(prior)
        # Of the coefficients relative to the prior: all begin as 1.
        self._c = [1.0] * len(prior)
        self._p = [[DOUBT * (i == j) for j in range(len(prior))] for i in range(len(prior))]
        self._error = 1.0
        self.count = 0

    @property
    def coefficients(self) -> list[float]:
        return [c * scale for c, scale in zip(self._c, self._scale, strict=True)]

    @property
    def error(self) -> float:
        """Typical size of an error relative to the prediction."""
        return self._error

    def predict(self, x: Sequence[float]) -> float:
        return sum(c * scale * v for c, scale, v in zip(self._c, self._scale, x, strict=True))

    def add(self, x: Sequence[float], y: float) -> None:
        """Learn from one observation; `x` not all 0. What is not positive is no measurement."""
        predicted = self.predict(x)
        if y <= 0 or predicted <= 0:
            return
        self.count += 1
        # Relative to the larger of both, or a prior that is far too small would be an outlier.
        size = max(y, predicted)
        row = [v * scale / size for v, scale in zip(x, self._scale, strict=True)]
        residual = (y - predicted) / size
        pull = min(1.0, CLIP * self._error / abs(residual)) if residual else 1.0
        self._error += 0.05 * (min(abs(residual), CLIP * self._error) - self._error)
        n = range(len(row))
        px = [sum(self._p[i][j] * row[j] for j in n) for i in n]
        gain = pull / (FORGET + pull * sum(row[i] * px[i] for i in n))
        self._c = [max(1e-6, self._c[i] + gain * px[i] * residual) for i in n]
        self._p = [[(self._p[i][j] - gain * px[i] * px[j]) / FORGET for j in n] for i in n]
        # What no observation speaks of must not become arbitrarily uncertain.
        if (most := max(self._p[i][i] for i in n)) > DOUBT:
            self._p = [[v * DOUBT / most for v in line] for line in self._p]


class CostFit:
    """The cost model of one worker, or of several alike."""

    def __init__(self, prior: CostModel = PRIOR) -> None:
        self._prefill = LeastSquares((prior.prefill_s, prior.token_s, prior.pair_s))
        self._step = LeastSquares((prior.step_s, prior.row_s, prior.kv_s))
        self._model = prior

    @property
    def model(self) -> CostModel:
        return self._model

    @property
    def num_prefills(self) -> int:
        """Prefills that were learnt from."""
        return self._prefill.count

    @property
    def num_steps(self) -> int:
        """Decode steps that were learnt from."""
        return self._step.count

    @property
    def prefill_error(self) -> float:
        """Typical error of a predicted prefill, relative."""
        return self._prefill.error

    def saw_prefill(self, new: int, cached: float, seconds: float) -> None:
        """A worker computed `new` tokens after `cached` ones in `seconds`."""
        self._prefill.add((1.0, new, new * (cached + new / 2)), seconds)
        self._update()

    def saw_step(self, batch: int, kv_tokens: int, seconds: float) -> None:
        """A decode step of `batch` sequences that hold `kv_tokens` in all took `seconds`."""
        self._step.add((1.0, batch, kv_tokens), seconds)
        self._update()

    def _update(self) -> None:
        prefill_s, token_s, pair_s = self._prefill.coefficients
        step_s, row_s, kv_s = self._step.coefficients
        self._model = CostModel(
            prefill_s=prefill_s,
            token_s=token_s,
            pair_s=pair_s,
            step_s=step_s,
            row_s=row_s,
            kv_s=kv_s,
        )
