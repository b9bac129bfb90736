"""What computing costs on one worker, in seconds: `CostModel`, a value.

Fitted online by `common.cost_fit`, by workers and by routers, read from a file by the simulator;
used by `router.placement` to predict queues and first tokens.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds of a prefill and of a decode step; the form is that of a dense transformer."""

    prefill_s: float = 0.01
    """Per prompt."""
    token_s: float = 1e-4
    """Per prompt token that is computed."""
    pair_s: float = 1e-9
    """Per pair of a computed token and a token that it attends to."""
    step_s: float = 0.01
    """Per decode step."""
    row_s: float = 1e-4
    """Per sequence in a decode step."""
    kv_s: float = 1e-8
    """Per token whose KV a decode step reads."""

    def prefill(self, new: float, cached: float = 0) -> float:
        """Seconds to compute `new` tokens after `cached` ones."""
        return self.prefill_s + new * (self.token_s + self.pair_s * (cached + new / 2))

    def step(self, batch: float, kv_tokens: float) -> float:
        """Seconds of one decode step of `batch` sequences that hold `kv_tokens` in all."""
        return self.step_s + self.row_s * batch + self.kv_s * kv_tokens


PRIOR = CostModel()
"""Before anything was measured. Placement compares sums of these, so ratios matter, not scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a worker measured of itself."""

    model: CostModel = PRIOR
    num_prefills: int = 0
    """Steps with prompts that `model` was fitted to; with none, it knows nothing of them."""
    num_steps: int = 0
    """Steps of decode rows alone."""
