"""What the steps of this worker cost, fitted as they are computed. Owned by `common.loop`.

A step of decode rows alone teaches what a decode step costs, one of prompt chunks alone what
prompts cost; of a mixed step, what it takes longer than its rows alone counts for its chunks.
"""

from collections.abc import Sequence
from typing import Final

from common.cost import Costs
from common.cost_fit import CostFit
from common.schedule import Chunk

KNOWN: Final = 8
"""Steps after which their cost is known well enough to be subtracted."""


class StepMeter:
    def __init__(self) -> None:
        self._fit = CostFit()

    @property
    def costs(self) -> Costs:
        """What routers are told."""
        fit = self._fit
        return Costs(model=fit.model, num_prefills=fit.num_prefills, num_steps=fit.num_steps)

    def saw(self, batch: Sequence[Chunk], seconds: float) -> None:
        """A step of `batch`, whose sequences did not advance yet, took `seconds`."""
        rows = kv_tokens = new = pairs = 0
        for chunk in batch:
            start = chunk.sequence.num_computed
            if chunk.count == 1:
                rows += 1
                kv_tokens += start
            else:
                new += chunk.count
                pairs += chunk.count * (2 * start + chunk.count)
        if not new:
            self._fit.saw_step(rows, kv_tokens, seconds)
            return
        if rows:
            if self._fit.num_steps < KNOWN:
                return
            seconds -= self._fit.model.step(rows, kv_tokens)
        # The mean context of the chunks together, as one chunk would have it.
        self._fit.saw_prefill(new, pairs / (2 * new) - new / 2, seconds)
