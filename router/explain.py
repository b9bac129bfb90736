"""Why a request went where it did, and where each part of its first token's time went.

`Explainer` is told by `router.dispatch` what happens to each request. It keeps the last requests
(`GET /v1/requests/{id}/explain`), writes a line of JSON for each if asked to, and measures
how good predictions are. A decision is kept as what `place` was given: its terms are computed when
somebody asks.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from common.messages import Output
from router.ladder import Ladder
from router.metrics import RouterMetrics
from router.placement import Candidate, Placement, View, weigh
from router.request import Attempt, Request

log = logging.getLogger(__name__)

KEPT: Final = 512
"""Requests that are kept when they are over. A live one is kept in any case."""
KEPT_DECISIONS: Final = 8
"""Of one request: the first of them, and the last."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One placement: what it was made from, and what it came to."""

    at: float
    """Monotonic seconds."""
    attempt: int
    view: View
    snapshot: Sequence[Candidate]
    placement: Placement

    def show(self, started: float) -> dict[str, Any]:
        placement = self.placement
        return {
            "attempt": self.attempt,
            "at_s": self.at - started,
            "prefill": placement.prefill,
            "decode": placement.decode,
            "fetch": placement.fetch,
            "uncached_tokens": placement.uncached,
            "predicted_ttft_s": placement.ttft_s,
            "candidates": [
                msgspec.structs.asdict(weighed) for weighed in weigh(self.view, self.snapshot)
            ],
        }

    def parts(self) -> dict[str, float | None]:
        """Predicted seconds of the parts of this attempt that placement predicts."""
        chosen = self.placement.prefill or self.placement.decode
        workers = {worker.id: worker for worker in self.snapshot}
        prefill = workers[chosen] if chosen is not None else None
        decode = workers.get(self.placement.decode or "")
        wait_s = prefill.wait_s if prefill is not None else 0.0
        step_s = None
        if decode is not None:
            kv_tokens = decode.kv_tokens + self.view.num_tokens
            step_s = decode.cost.step(decode.num_seqs + 1, kv_tokens)
        return {
            "prefill_queue": wait_s,
            "prefill": max(0.0, self.placement.ttft_s - wait_s),
            "first_step": step_s,
        }


@dataclass(slots=True, eq=False)
class Trace:
    """What is known of one request. Times are monotonic seconds."""

    request: int
    label: str
    tenant: str
    prompt_tokens: int
    received: float
    started: float
    wall: float
    decisions: list[Decision] = field(default_factory=list)
    sent: float | None = None
    """When the attempt that brought the first token was sent to its workers."""
    first: float | None = None
    """When the first token came; `repeated`: again from the decode worker; `second`: the next."""
    repeated: float | None = None
    second: float | None = None
    prefill_timing: tuple[float, ...] = ()
    decode_timing: tuple[float, ...] = ()
    predicted_hit: int = 0
    reused: int = 0
    output_tokens: int = 0
    outcome: str = "live"

    def show(self) -> dict[str, Any]:
        """As JSON."""
        first = self.decisions[0] if self.decisions else None
        return {
            "id": self.label,
            "request": f"{self.request:016x}",
            "at": self.wall,
            "outcome": self.outcome,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "reused_tokens": {"predicted": self.predicted_hit, "actual": self.reused},
            "ttft_s": {
                "predicted": first.placement.ttft_s if first is not None else None,
                "actual": None if self.first is None else self.first - self.started,
            },
            "parts_s": self._parts(),
            "decisions": [decision.show(self.started) for decision in self.decisions],
        }

    def _parts(self) -> dict[str, dict[str, float | None]]:
        """Predicted and actual, in order; the last three come after the first token."""
        actual: dict[str, float | None] = {
            "tokenise": self.started - self.received,
            "router_queue": None if self.sent is None else self.sent - self.started,
            "prefill_queue": self.prefill_timing[0] if self.prefill_timing else None,
            "prefill": self.prefill_timing[1] if self.prefill_timing else None,
            "exposed_transfer": _between(self.first, self.repeated),
            "decode_queue": self.decode_timing[0] if self.decode_timing else None,
            "first_step": _between(self.repeated or self.first, self.second),
        }
        predicted = self.decisions[-1].parts() if self.decisions else {}
        return {
            name: {"predicted": predicted.get(name), "actual": value}
            for name, value in actual.items()
        }


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start)


class Explainer:
    def __init__(self, metrics: RouterMetrics, log_file: Path | None = None) -> None:
        """`log_file`: where a line of JSON is added for each request that ends. Raises OSError."""
        self.ladder = Ladder()
        self._metrics = metrics
        self._live: dict[int, Trace] = {}
        self._over: deque[Trace] = deque(maxlen=KEPT)
        # Line by line: whoever follows the file sees whole objects.
        self._log = log_file.open("a", buffering=1) if log_file is not None else None

    def close(self) -> None:
        """Ends the log. Never fails: serving does not depend on it."""
        if self._log is not None:
            # Each line was flushed when it was written; what is left was refused then.
            with contextlib.suppress(OSError):
                self._log.close()
            self._log = None

    def find(self, label: str, tenant: str) -> list[Trace]:
        """What is kept of one HTTP call, a trace for each prompt. `tenant`: who asks; empty: it
        may see all."""
        found = [
            trace
            for trace in (*self._over, *self._live.values())
            if trace.label == label and tenant in ("", trace.tenant)
        ]
        return sorted(found, key=lambda trace: trace.started)

    def submitted(self, request: Request) -> None:
        self._live[request.id] = Trace(
            request=request.id,
            label=request.label,
            tenant=request.tenant,
            prompt_tokens=len(request.prompt),
            received=request.received,
            started=request.started,
            wall=time.time(),
        )

    def placed(
        self,
        request: Request,
        attempt: Attempt,
        view: View,
        snapshot: Sequence[Candidate],
        placement: Placement,
    ) -> None:
        trace = self._live[request.id]
        if attempt.number == 1:
            self._arrived(request, view, snapshot)
        now = time.monotonic()
        if trace.first is None:
            trace.sent = now
        if attempt.number == 1:
            trace.predicted_hit = len(request.prompt) - placement.uncached
        if len(trace.decisions) == KEPT_DECISIONS:
            trace.decisions.pop()
        trace.decisions.append(Decision(now, attempt.number, view, snapshot, placement))

    def _arrived(self, request: Request, view: View, snapshot: Sequence[Candidate]) -> None:
        chain, block_size = request.main_chain
        same = [worker for worker in snapshot if worker.layout.block_size == block_size]
        capacity = sum(worker.capacity for worker in same) // block_size
        best = max(view.hits.values(), default=0)
        self.ladder.arrived(chain, block_size, len(request.prompt), capacity, best)

    def took(self, request: Request, attempt: Attempt, worker: str, output: Output) -> None:
        """An output of a live attempt, after the request has taken it."""
        trace = self._live[request.id]
        if trace.second is not None:
            return
        now = time.monotonic()
        if worker == attempt.decode and attempt.prefill is not None:
            if trace.repeated is None:
                trace.repeated, trace.decode_timing = now, output.timing
        elif not trace.prefill_timing:
            trace.prefill_timing = output.timing
        if trace.first is None:
            trace.first = now
        elif output.index > 0:
            trace.second = now

    def first_token(self, request: Request, attempt: Attempt) -> None:
        """The first token came: compare what was predicted with what was."""
        self.ladder.reused(request.cached_tokens)
        trace = self._live[request.id]
        if attempt.number != 1 or not trace.decisions:
            return
        assert request.first_token is not None
        predicted_s = trace.decisions[0].placement.ttft_s
        actual_s = request.first_token - (trace.sent or request.started)
        if actual_s > 0:
            self._metrics.ttft_error.observe(abs(predicted_s - actual_s) / actual_s)
        self._metrics.hit_error.observe(abs(trace.predicted_hit - request.cached_tokens))
        self._metrics.predicted_tokens.inc(trace.predicted_hit)

    def ended(self, request: Request, outcome: str) -> None:
        trace = self._live.pop(request.id)
        self._over.append(trace)
        trace.outcome = outcome
        trace.reused = request.cached_tokens
        trace.output_tokens = request.num_outputs
        if self._log is not None:
            try:
                self._log.write(msgspec.json.encode(trace.show()).decode() + "\n")
            except OSError as error:
                log.error("%s: no more requests are logged: %s", self._log.name, error)
                self.close()

    def show_ladder(self) -> None:
        """Take over the ladder into the metrics."""
        for rung, tokens in self.ladder.tokens.items():
            self._metrics.ladder.labels(rung).set(tokens)
        self._metrics.ladder_prompt.set(self.ladder.prompt_tokens)
