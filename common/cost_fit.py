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

FORGET: Final = 0.97
"""Weight of what is known of a kind when one more of it comes: about the last 30 count, of mixed
kinds the last 100, for each speaks of a third of what three coefficients are."""
CLIP: Final = 3.0
"""Typical errors beyond which an observation pulls no harder."""
DOUBT: Final = 10000.0
"""Variance of a coefficient relative to the square of its scale, before anything is known."""
LEAST: Final = 1e-6
"""Of a coefficient, relative to its scale."""


class LeastSquares:
    """`y = sum(c_i * x_i)` with coefficients `c_i >= 0`."""

    def __init__(self, prior: Sequence[float], scale: Sequence[float] = ()) -> None:
        """`prior`: positive coefficients, one for each `x_i`. `scale`: what they may be like if
        they are not like the prior."""
        self._scale = list(scale or prior)
        # Of the coefficients relative to their scale.
        self._c = [c / size for c, size in zip(prior, self._scale, strict=True)]
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
        doubt = sum(row[i] * px[i] for i in n)
        told = pull * doubt
        gain = pull / (1 + told)
        self._c = [self._c[i] + gain * px[i] * residual for i in n]
        # Forgotten is only what the observation speaks of (Kulhavy's directional forgetting): what
        # steps of one size say of a sequence holds until there are steps of another size.
        less = (FORGET * told - (1 - FORGET)) / (FORGET * doubt * (1 + told))
        self._p = [[self._p[i][j] - less * px[i] * px[j] for j in n] for i in n]
        self._bound()

    def _bound(self) -> None:
        """A coefficient that came out too low is the least one, and the others become what is most
        likely beside that. To cut it off alone would leave a sum that nobody measured: one slow
        step of two sequences may ask for dear sequences and for steps of less than nothing."""
        n, p = range(len(self._c)), self._p
        for _ in n:
            low = min(n, key=self._c.__getitem__)
            lack = LEAST - self._c[low]
            if lack <= 0:
                return
            if p[low][low] > 1e-9 * self._p[low][low]:  # else it is known from those before it
                share = [line[low] / p[low][low] for line in p]
                self._c = [c + lack * part for c, part in zip(self._c, share, strict=True)]
                p = [[p[i][j] - share[i] * p[low][j] for j in n] for i in n]
            self._c[low] = LEAST


class CostFit:
    """The cost model of one worker, or of several alike."""

    def __init__(self, start: CostModel = PRIOR) -> None:
        """`start`: what is known before. What it takes to cost next to nothing, which is often all
        that few measurements say, may turn out to cost as much as it does by `PRIOR`."""

        def fit(*names: str) -> LeastSquares:
            known = [getattr(start, name) for name in names]
            return LeastSquares(
                known, [max(c, getattr(PRIOR, name)) for c, name in zip(known, names, strict=True)]
            )

        self._prefill = fit("prefill_s", "token_s", "pair_s")
        self._step = fit("step_s", "row_s", "kv_s")
        self._model = start

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

    def saw_step(self, batch: float, kv_tokens: float, seconds: float) -> None:
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
