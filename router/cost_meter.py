"""What the work of one worker costs, measured by what its router sees. Owned by `router.fleet`.

A prefill worker computes prompts in the order in which they came: a prompt's compute lasts from
when it was sent, or from the first output before its own if that came later. Work of other routers
counts as this prompt's, so the cost of a shared worker is rather over- than underestimated.
"""

from typing import Final

from common.messages import Load
from router.cost import CostModel
from router.cost_fit import CostFit

ENOUGH: Final = 32
"""Prefills that a worker's own model needs before it counts."""
UNLIKE: Final = 1.5
"""Factor from its peers at which a worker is placed upon by its own model. Below it is taken to be
like them, so that noise prefers nobody."""
_PROMPT: Final = 1_000


class CostMeter:
    def __init__(self, peers: CostFit) -> None:
        """`peers`: what all workers of the role are measured by; shared."""
        self._peers = peers
        self._own = CostFit()
        self._sent: dict[object, float] = {}
        self._computed_at = 0.0
        self._stepped_at: float | None = None
        self._load = Load()

    @property
    def model(self) -> CostModel:
        """The costs to place upon."""
        own, peers = self._own.model, self._peers.model
        if self._own.num_prefills < ENOUGH:
            return peers
        ratio = own.prefill(_PROMPT) / peers.prefill(_PROMPT)
        return own if not 1 / UNLIKE < ratio < UNLIKE else peers

    def sent(self, prompt: object, now: float) -> None:
        """A prompt was sent to the worker."""
        self._sent[prompt] = now

    def waits_for(self, prompt: object) -> bool:
        """The prompt was sent, and nothing came of it yet."""
        return prompt in self._sent

    def computed(self, prompt: object, new: int, cached: int, now: float) -> None:
        """Its first output came, after `new` tokens were computed and `cached` ones reused."""
        seconds = now - max(self._sent.pop(prompt), self._computed_at)
        self._computed_at = now
        for fit in (self._own, self._peers):
            fit.saw_prefill(new, cached, seconds)

    def dropped(self, prompt: object) -> None:
        """The prompt is over; ignored if its first output came."""
        self._sent.pop(prompt, None)

    def stepped(self, load: Load, now: float) -> None:
        """The outputs of a decode worker's step came, and its load after it."""
        before, since = self._load, self._stepped_at
        if since is not None and not before.prefill_tokens and not load.prefill_tokens:
            for fit in (self._own, self._peers):
                fit.saw_step(before.running, before.kv_tokens, now - since)
        self._load = load
        # An idle worker waits before its next step.
        self._stepped_at = now if load.running else None
