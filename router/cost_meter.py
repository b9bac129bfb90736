"""What the work of one worker costs, by what it says and by what its router sees. Owned by
`router.fleet`.

A worker measures its steps itself, and a router that just started places upon that. What a prefill
worker's queue costs is better known by what the router sees, once it saw enough.

A prefill worker computes the prompt with the least left first: a prompt's compute lasts from when
it was sent, or from the first output before its own if that came later. How long one was computed
that others overtook is not to be seen from here: it teaches nothing. Work of other routers counts
as this prompt's, so the cost of a shared worker is rather over- than underestimated.
"""

from dataclasses import dataclass, replace
from typing import Final

from common.cost import PRIOR, CostModel, Costs
from common.cost_fit import CostFit
from common.messages import Load
from router.health import SLOW, Pace
from router.placement import Queued

ENOUGH: Final = 32
"""Prefills that a worker's own model needs before it counts."""
UNLIKE: Final = 1.5
"""Factor from its peers at which a worker is placed upon by its own model. Below it is taken to be
like them, so that noise prefers nobody."""
TOLD: Final = 8
"""Steps after which what a worker says of them counts."""
SPAN_S: Final = 0.02
"""Steps in a row that take less together are learnt from as one: a router that is busy finds some
of their messages together, as if all of them but the first had taken no time."""
_PROMPT: Final = 1_000


@dataclass(slots=True)
class Run:
    """Decode steps in a row: sums."""

    steps: int = 0
    running: int = 0
    kv_tokens: int = 0
    seconds: float = 0.0

    def add(self, load: Load, seconds: float) -> None:
        self.steps += 1
        self.running += load.running
        self.kv_tokens += load.kv_tokens
        self.seconds += seconds


class Peers:
    """Workers of one role and model: what they cost, as the router sees it and as they say."""

    def __init__(self, prefills: "Peers | None" = None) -> None:
        """prefills: what prompts cost where these workers have computed none yet."""
        self.fit = CostFit()
        self._told = PRIOR
        self._knows_prompts = False
        self._prefills = prefills

    def told(self, costs: Costs) -> None:
        """One of them said what it measured: of all that is known, the part that it knows."""
        if costs.num_prefills >= TOLD:
            self._told = _join(prompts=costs.model, steps=self._told)
            self._knows_prompts = True
        if costs.num_steps >= TOLD:
            self._told = _join(prompts=self._told, steps=costs.model)
        if not self.fit.num_prefills and not self.fit.num_steps:
            self.fit = CostFit(self._told)

    @property
    def said(self) -> CostModel:
        """What they measured themselves, step by step, as far as they told."""
        return self._told

    @property
    def own_prompts(self) -> CostModel:
        """What prompts cost that they compute beside their decode rows, which no router sees."""
        if self._knows_prompts or self._prefills is None:
            return self._told
        return self._prefills.fit.model


def _join(*, prompts: CostModel, steps: CostModel) -> CostModel:
    return replace(
        steps, prefill_s=prompts.prefill_s, token_s=prompts.token_s, pair_s=prompts.pair_s
    )


class CostMeter:
    def __init__(self, peers: Peers, *, decodes: bool = False) -> None:
        """`peers`: what all workers of the role are measured by; shared. `decodes`: it computes
        prompts only beside other work."""
        self._peers = peers
        self._decodes = decodes
        self._own = CostFit()
        self._sent: dict[object, tuple[int, float]] = {}
        """Of prompts without output: tokens to compute, and when they were sent."""
        self._computed_at = 0.0
        self._latest = 0.0
        """When the last one was sent of those that were computed."""
        self._stepped_at: float | None = None
        self._load = Load()
        self._run = Run()
        """Steps that nothing was learnt from yet."""
        self._slowness, self._seen = 1.0, 0

    @property
    def pace(self) -> Pace:
        """How slow it is beside its peers."""
        return Pace(self._slowness, self._seen)

    def forget_pace(self) -> None:
        """Only what is seen from now on counts."""
        self._slowness, self._seen = 1.0, 0

    def _compare(self, seconds: float, predicted_s: float) -> None:
        """What took `seconds` was to take `predicted_s` on any of its peers."""
        if predicted_s > 0:
            ratio = min(max(seconds, 0.0) / predicted_s, 10 * SLOW)
            self._slowness += (ratio - self._slowness) / 16
            self._seen += 1

    @property
    def model(self) -> CostModel:
        """The costs to place upon."""
        own, peers = self._own.model, self._peers.fit.model
        if self._decodes:
            return _join(prompts=self._peers.own_prompts, steps=peers)
        if self._own.num_prefills < ENOUGH:
            return peers
        ratio = own.prefill(_PROMPT) / peers.prefill(_PROMPT)
        return own if not 1 / UNLIKE < ratio < UNLIKE else peers

    @property
    def said(self) -> CostModel:
        """What workers of this kind say of their steps, without what a router adds to them."""
        return self._peers.said

    def told(self, costs: Costs) -> None:
        """What the worker measured of itself."""
        self._peers.told(costs)

    def sent(self, prompt: object, new: int, now: float) -> None:
        """A prompt was sent to the worker, which has to compute `new` tokens of it."""
        self._sent[prompt] = new, now

    def waits_for(self, prompt: object) -> bool:
        """The prompt was sent, and nothing came of it yet."""
        return prompt in self._sent

    def queue(self, now: float) -> list[Queued]:
        """The prompts of this router that nothing came of yet.

        A prefill worker takes whoever has least left, less what was computed since that one came.
        Neither is more than what it computes in that time, so whatever is shorter than the whole
        prompt less twice that goes first.
        """
        token_s = self.model.token_s
        return [Queued(new, new - 2 * (now - sent) / token_s) for new, sent in self._sent.values()]

    def computed(self, prompt: object, new: int, cached: int, now: float) -> None:
        """Its first output came, after `new` tokens were computed and `cached` ones reused."""
        _, sent = self._sent.pop(prompt)
        seconds = now - max(sent, self._computed_at)
        self._computed_at = now
        if sent < self._latest:  # overtaken
            return
        self._latest = sent
        if self._peers.fit.num_prefills >= ENOUGH:
            self._compare(seconds, self._peers.fit.model.prefill(new, cached))
        for fit in (self._own, self._peers.fit):
            fit.saw_prefill(new, cached, seconds)

    def dropped(self, prompt: object) -> None:
        """The prompt is over; ignored if its first output came."""
        self._sent.pop(prompt, None)

    def stepped(self, load: Load, now: float, *, follows: bool) -> None:
        """The outputs of a decode worker's step came, and its load after it.

        `follows`: those of the step before came here too. A worker tells a router only of steps in
        which something of that router ran.
        """
        before, since = self._load, self._stepped_at if follows else None
        if since is not None and not before.prefill_tokens and not load.prefill_tokens:
            self._run.add(before, now - since)
            if self._run.seconds >= SPAN_S:
                self._learn(self._run)
                self._run = Run()
        else:
            self._run = Run()
        self._load = load
        # An idle worker waits before its next step.
        self._stepped_at = now if load.running else None

    def _learn(self, run: Run) -> None:
        """The cost of a step is linear in what it computes: the mean of some is that of the mean
        step."""
        running, kv_tokens = run.running / run.steps, run.kv_tokens / run.steps
        seconds = run.seconds / run.steps
        if self._peers.fit.num_steps >= ENOUGH:
            self._compare(seconds, self._peers.fit.model.step(running, kv_tokens))
        for fit in (self._own, self._peers.fit):
            fit.saw_step(running, kv_tokens, seconds)
