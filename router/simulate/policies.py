"""The rules of placement that a simulation compares: ours, and those of other routers.

Each of the others chooses a prefill worker by its published rule and defaults; the decode worker
is in all of them the one that holds the fewest tokens, so that only the choice of the prefill
worker differs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, Protocol

from common.blockhash import BlockHash
from common.errors import ConfigError
from router.placement import Candidate, Placement, View, place


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt that is to be placed."""

    view: View
    blocks: Sequence[BlockHash]
    block_tokens: int


class Policy(Protocol):
    pooled: bool
    """No router: all workers share one cache and one queue."""
    shortest_first: bool
    """Prefill workers take the shortest prompt first."""

    def place(self, ask: Ask, workers: Sequence[Candidate], rng: Random) -> Placement | None: ...


class Tandem:
    """Our own rule: the code that the router runs."""

    pooled = False
    shortest_first = True

    def place(self, ask: Ask, workers: Sequence[Candidate], rng: Random) -> Placement | None:
        return place(ask.view, workers, rng)


class Pooled:
    """The bound: every worker can use what any of them has computed, and none has a queue."""

    pooled = True
    shortest_first = False

    def place(self, ask: Ask, workers: Sequence[Candidate], rng: Random) -> Placement | None:
        raise AssertionError("a pooled cluster places nothing")


class _Rule:
    """Chooses a prefill worker; the decode worker is the one that holds the fewest tokens."""

    pooled = False
    shortest_first = False

    def place(self, ask: Ask, workers: Sequence[Candidate], rng: Random) -> Placement | None:
        prefills = [w for w in workers if w.role == "prefill" and w.ready]
        decodes = [w for w in workers if w.role == "decode" and w.ready]
        if not decodes:
            return None
        decode = min(decodes, key=lambda w: w.kv_tokens)
        if not prefills:
            return Placement(None, decode.id, ask.view.num_tokens)
        return self.prefill(ask, prefills, decode, rng)

    def prefill(
        self, ask: Ask, prefills: Sequence[Candidate], decode: Candidate, rng: Random
    ) -> Placement:
        chosen = self.choose(ask, prefills, rng)
        return Placement(chosen.id, decode.id, _new(ask, chosen))

    def choose(self, ask: Ask, prefills: Sequence[Candidate], rng: Random) -> Candidate:
        raise NotImplementedError


class RandomWorker(_Rule):
    def choose(self, ask: Ask, prefills: Sequence[Candidate], rng: Random) -> Candidate:
        return rng.choice(prefills)


class RoundRobin(_Rule):
    def __init__(self) -> None:
        self._turn = 0

    def choose(self, ask: Ask, prefills: Sequence[Candidate], rng: Random) -> Candidate:
        self._turn += 1
        return prefills[self._turn % len(prefills)]


class LeastTokens(_Rule):
    """Fewest prompt tokens pending, whatever of them is cached."""

    def choose(self, ask: Ask, prefills: Sequence[Candidate], rng: Random) -> Candidate:
        return _least(prefills, lambda w: w.prefill_tokens, rng)


class Sticky(_Rule):
    """The longest match of more than the one block that all prompts may share; else, and of equal
    ones, the least queue."""

    def choose(self, ask: Ask, prefills: Sequence[Candidate], rng: Random) -> Candidate:
        first = ask.block_tokens
        hits = {w.id: hit if (hit := _hit(ask, w)) > first else 0 for w in prefills}
        return _least(prefills, lambda w: (-hits[w.id], w.wait_s), rng)


class CacheAware(_Rule):
    """SGLang's cache_aware with the defaults of its code: 0.5, 32, 1.1."""

    def __init__(self, threshold: float = 0.5, absolute: int = 32, relative: float = 1.1) -> None:
        self._threshold = threshold
        self._absolute = absolute
        self._relative = relative
        self._trees: dict[str, set[BlockHash]] = {}

    def choose(self, ask: Ask, prefills: Sequence[Candidate], rng: Random) -> Candidate:
        trees = self._trees
        loads = [w.num_seqs for w in prefills]
        high, low = max(loads), min(loads)
        if high - low > self._absolute and high > self._relative * low:
            chosen = _least(prefills, lambda w: w.num_seqs, rng)
        else:
            matches = {w.id: _match(trees.get(w.id, set()), ask.blocks) for w in prefills}
            best = max(prefills, key=lambda w: matches[w.id])
            if ask.blocks and matches[best.id] / len(ask.blocks) > self._threshold:
                chosen = best
            else:
                chosen = _least(prefills, lambda w: len(trees.get(w.id, ())), rng)
        trees.setdefault(chosen.id, set()).update(ask.blocks)
        return chosen


class DynamoCost(_Rule):
    """Dynamo's cost of a prefill worker: pending prefill blocks, with those of this prompt, less
    those it has. Overlap credit 1, temperature 0."""

    def choose(self, ask: Ask, prefills: Sequence[Candidate], rng: Random) -> Candidate:
        return _least(prefills, lambda w: w.prefill_tokens + _new(ask, w), rng)


class LlmdScorers(_Rule):
    """llm-d's precise prefix scorer (2), KV utilisation (1) and queue (1)."""

    def choose(self, ask: Ask, prefills: Sequence[Candidate], rng: Random) -> Candidate:
        queues = [max(0, w.num_seqs - 1) for w in prefills]
        high, low = max(queues), min(queues)
        total = ask.view.num_tokens

        def score(worker: Candidate) -> float:
            queue = max(0, worker.num_seqs - 1)
            free = 1.0 if high == low else (high - queue) / (high - low)
            usage = min(1.0, worker.prefill_tokens / worker.capacity)
            return -(2 * _hit(ask, worker) / total + (1 - usage) + free)

        return _least(prefills, score, rng)


class MinTtft(_Rule):
    """The least predicted TTFT, without fetching."""

    def choose(self, ask: Ask, prefills: Sequence[Candidate], rng: Random) -> Candidate:
        return _least(prefills, lambda w: w.wait_s + _prefill_s(ask, w), rng)


class Conductor(_Rule):
    """Mooncake's Conductor: the least predicted TTFT, where a worker whose match is much shorter
    than the best one fetches that one first."""

    def __init__(self, balancing: float = 1.0) -> None:
        self._balancing = balancing

    def prefill(
        self, ask: Ask, prefills: Sequence[Candidate], decode: Candidate, rng: Random
    ) -> Placement:
        # The paper fetches from other prefill workers only.
        held = {w.id: min(ask.view.held.get(w.id, 0), ask.view.num_tokens - 1) for w in prefills}
        owner = max(prefills, key=lambda w: held[w.id])
        best = held[owner.id]
        total = ask.view.num_tokens
        plans = []
        for worker in prefills:
            hit = _hit(ask, worker)
            if best <= hit * self._balancing or worker.fetch_s is None:
                ttft, fetch = worker.wait_s + _prefill_s(ask, worker), None
            else:
                ttft = (
                    (best - hit) * worker.fetch_s
                    + worker.wait_s
                    + worker.cost.prefill(total - best, best)
                )
                fetch, hit = owner.id, best
            plans.append((ttft, Placement(worker.id, decode.id, total - hit, fetch, ttft)))
        least = min(ttft for ttft, _ in plans)
        return rng.choice([plan for ttft, plan in plans if ttft == least])


def _hit(ask: Ask, worker: Candidate) -> int:
    return min(ask.view.hits.get(worker.id, 0), ask.view.num_tokens - 1)


def _new(ask: Ask, worker: Candidate) -> int:
    return ask.view.num_tokens - _hit(ask, worker)


def _prefill_s(ask: Ask, worker: Candidate) -> float:
    return worker.cost.prefill(_new(ask, worker), _hit(ask, worker))


def _match(tree: set[BlockHash], blocks: Sequence[BlockHash]) -> int:
    return next((i for i, name in enumerate(blocks) if name not in tree), len(blocks))


def _least(
    workers: Sequence[Candidate],
    cost: Callable[[Candidate], float | tuple[float, ...]],
    rng: Random,
) -> Candidate:
    costs = [cost(worker) for worker in workers]
    least = min(costs)
    best = [worker for worker, value in zip(workers, costs, strict=True) if value == least]
    return best[0] if len(best) == 1 else rng.choice(best)


POLICIES: Final[dict[str, Callable[[], Policy]]] = {
    "tandem": Tandem,
    "random": RandomWorker,
    "round-robin": RoundRobin,
    "least-tokens": LeastTokens,
    "sticky": Sticky,
    "sglang": CacheAware,
    "dynamo": DynamoCost,
    "llm-d": LlmdScorers,
    "min-ttft": MinTtft,
    "conductor": Conductor,
    "pooled": Pooled,
}


def policy(name: str) -> Policy:
    """A fresh policy. Raises ConfigError for a name that is not in POLICIES."""
    if name not in POLICIES:
        raise ConfigError(f"--policy: {name!r} is none of {', '.join(POLICIES)}")
    return POLICIES[name]()
