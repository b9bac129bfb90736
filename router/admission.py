"""What is refused at once because it would not be served within its limits.

Called by `router.dispatch` before anything of a new request is sent to a worker, and only where
there are limits (`--slo-ttft`, `--slo-itl`). An idle worker takes whatever comes: waiting makes
nothing better there, and costs would never be learnt.
"""

import math
from collections.abc import Sequence

from common.errors import RequestError
from router.errors import overloaded
from router.placement import Candidate, Placement, View, Weighed, weigh
from router.slo import Slo


def refusal(
    slo: Slo, view: View, snapshot: Sequence[Candidate], placement: Placement, waited_s: float
) -> RequestError | None:
    """Why the request is not to be served now; None: a placement is predicted to meet the limits.

    `waited_s`: how long it waited at the router. The error (429) says when to try again.
    """
    late_s = _late_s(slo, view, snapshot, placement, waited_s)
    if late_s > 0:
        return overloaded("No worker can answer within the limit of the first token.", late_s)
    if slo.itl_s is not None and _is_crowded(slo.itl_s, view, snapshot):
        return overloaded("No worker can generate within the limit between tokens.", 1.0)
    return None


def ttft_limit(slo: Slo, view: View, snapshot: Sequence[Candidate]) -> float:
    """Seconds within which the first token must come."""
    if slo.ttft is None:
        return math.inf
    # Whoever prefills: where there are prefill workers, one of them. Also one that has no room now:
    # how long a prompt takes does not depend on that.
    serving = [worker for worker in snapshot if worker.serves]
    workers = [worker for worker in serving if worker.role == "prefill"] or serving
    return slo.ttft.of(min((w.cost.prefill(view.num_tokens) for w in workers), default=0.0))


def _late_s(
    slo: Slo, view: View, snapshot: Sequence[Candidate], placement: Placement, waited_s: float
) -> float:
    """Seconds by which the best placement would miss the limit of the first token."""
    left_s = ttft_limit(slo, view, snapshot) - waited_s
    if placement.ttft_s <= left_s:
        return 0.0
    weighed = [w for w in weigh(view, snapshot) if not w.objection]
    able = [w for w in weighed if w.prefills]
    # Decode workers alone: they have to, whatever their residents say.
    able = able if any(w.role == "prefill" for w in weighed) else weighed
    workers = {worker.id: worker for worker in snapshot}
    if any(workers[w.worker].wait_s <= 0 for w in able):
        return 0.0
    ttft_s = min(w.ttft_s - _overtaken_s(workers[w.worker], w) for w in able)
    return max(0.0, ttft_s - left_s)


def _overtaken_s(worker: Candidate, weighed: Weighed) -> float:
    """Seconds of the worker's queue that a short prompt does not wait for."""
    tokens = sum(q.tokens for q in worker.queue if weighed.uncached_tokens < q.after)
    return min(weighed.wait_s, tokens * worker.cost.token_s)


def _is_crowded(itl_s: float, view: View, snapshot: Sequence[Candidate]) -> bool:
    """Every decode worker would be too slow with one more."""
    decodes = [worker for worker in snapshot if worker.role == "decode" and worker.ready]
    return bool(decodes) and all(
        worker.num_seqs > 0
        and worker.cost.step(worker.num_seqs + 1, worker.kv_tokens + view.num_tokens) > itl_s
        for worker in decodes
    )
