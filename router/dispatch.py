"""The requests that are live: placed on workers, followed token by token, replaced on failure.

All recovery goes through `Dispatcher.replace`. Owned by `router.service`, which brings what the
workers say; everything runs in the router's loop.

    submit -> place -> (Prefill to P, Admit to D) -> take each output once -> finish
                 ^                                          |
                 +--- wait, if no worker can <--- replace <-+ lost worker, failed transfer, drain
"""

import asyncio
import dataclasses
import logging
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from common.blockhash import UNIT
from common.errors import RequestError
from common.link import RouterLink
from common.messages import Cancel, Failed, FetchFrom, Output
from router.admission import refusal, ttft_limit
from router.directory import Directory
from router.errors import internal, nothing_allowed, overloaded, unavailable
from router.explain import Explainer
from router.fleet import Fleet
from router.health import RetryBudget
from router.metrics import RouterMetrics
from router.placement import View, place
from router.request import Attempt, Delta, Request
from router.slo import Slo
from router.waiting import Bounds, Entry, Misses, WaitingQueue
from router.work import assignments

log = logging.getLogger(__name__)

NO_LIMITS: Final = Slo()
BOUNDS: Final = Bounds()
_NO_FAILURE: Final = ("draining", "no_blocks")
"""Causes that do not count against `max_resumes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long and how often a request is held up by workers."""

    max_resumes: int = 3
    grace_s: float = 1.0
    """A new request waits this long for a worker that can take it."""
    resume_s: float = 20.0
    """A request with tokens waits this long: a worker that died may be restarted."""


class Dispatcher:
    def __init__(
        self,
        directory: Directory,
        link: RouterLink,
        fleet: Fleet,
        metrics: RouterMetrics,
        patience: Patience,
        explainer: Explainer,
        step_s: float | None = None,
        slo: Slo = NO_LIMITS,
        bounds: Bounds = BOUNDS,
    ) -> None:
        """`step_s`: how long a decode step may become by a prompt that is computed beside it; None:
        decode workers compute prompts only where no prefill worker can. `slo`: what cannot be met
        is refused; `bounds`: what may wait."""
        self._directory = directory
        self._link = link
        self._fleet = fleet
        self._metrics = metrics
        self._patience = patience
        self._explainer = explainer
        self._step_s = step_s
        self._rng = random.Random()
        self._budget = RetryBudget(self._rng)
        self._requests: dict[int, Request] = {}
        self._slo = slo
        self._waiting = WaitingQueue(metrics, bounds)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_live(self) -> int:
        return len(self._requests)

    @property
    def num_waiting(self) -> int:
        """Attempts for which no worker was free."""
        return len(self._waiting)

    async def idle(self) -> None:
        """Returns when no request is live."""
        await self._idle.wait()

    def submit(self, request: Request) -> None:
        """Serve the request; what happens to it arrives in its `events`."""
        assert request.id not in self._requests
        self._requests[request.id] = request
        self._idle.clear()
        self._metrics.live.set(len(self._requests))
        self._metrics.prompt_tokens.inc(len(request.prompt))
        self._metrics.vllm.submitted(len(request.prompt))
        self._explainer.submitted(request)
        self._start(request, tuple(choice.number for choice in request.choices))

    def cancel(self, request: Request) -> None:
        """Stop all work for the request, if it is not over yet."""
        if not request.over:
            self._end(request, "cancelled")

    def fail_all(self, error: RequestError) -> None:
        for request in list(self._requests.values()):
            self._fail(request, error)

    def leaving(self, worker: str) -> None:
        """A worker drains: it ends what it has and gets nothing new."""
        member = self._fleet[worker]
        if not member.draining:
            member.draining = True
            self._limit_waiting()

    def lost(self, worker: str, cause: str) -> None:
        """A worker is gone or hangs: no new work is placed there."""
        self._limit_waiting()
        for request in list(self._requests.values()):
            for attempt in list(request.attempts.values()):
                # Replacing one attempt may have ended the request, and so the others.
                if attempt.number in request.attempts and attempt.needs(worker):
                    self.replace(request, attempt, cause, (worker,))

    def _settle(self, request: Request, choices: tuple[int, ...]) -> bool:
        """Start an attempt for `choices`, or fail the request if it cannot be sent at all; False
        if no worker can take it now."""
        assert not request.over
        try:
            return self._place(request, choices)
        except RequestError as error:
            self._fail(request, error)
            return True
        except Exception:
            # Whatever one request trips over must not end the others.
            log.exception("request %s cannot be placed", request.label)
            self._fail(request, internal(request.label))
            return True

    def _place(self, request: Request, choices: tuple[int, ...]) -> bool:
        first = request.choices[choices[0]]
        outputs = first.tokens
        assert len(choices) == 1 or not outputs
        num_tokens = len(request.prompt) + len(outputs)
        hits = self._hits(request)
        view = View(
            num_tokens=num_tokens,
            num_choices=len(choices),
            remaining=request.remaining(first),
            hits=hits,
            held=self._held(request, hits),
            avoid=frozenset(request.avoid | request.refused),
            avoid_pairs=frozenset(request.avoid_pairs),
            content_id=request.content_id,
            itl_s=self._step_s,
        )
        snapshot = self._fleet.snapshot()
        placement = place(view, snapshot, self._rng)
        if placement is None and request.avoid:
            # Rather a worker that failed it before than none.
            view = dataclasses.replace(view, avoid=frozenset(request.refused))
            placement = place(view, snapshot, self._rng)
        if placement is None:
            return False
        if request.next_attempt == 1 and self._slo != NO_LIMITS:
            waited_s = time.monotonic() - request.started
            if (error := refusal(self._slo, view, snapshot, placement, waited_s)) is not None:
                raise error
        attempt = Attempt(
            number=request.next_attempt,
            choices=choices,
            prefill=placement.prefill,
            decode=placement.decode,
            prefill_tokens=placement.uncached,
            kv_tokens=num_tokens,
            first=request.first_token is None,
            fetch=placement.fetch,
        )
        request.next_attempt += 1
        request.attempts[attempt.number] = attempt
        self._fleet.reserve(attempt)
        for worker in attempt.workers():
            request.content_id = self._fleet[worker].info.content_id
        self._explainer.placed(request, attempt, view, snapshot, placement)
        source = None
        if placement.fetch is not None:
            owner = self._fleet[placement.fetch].peer
            source = FetchFrom(owner, hits[owner.id] // UNIT, placement.fetch_within_s)
            self._metrics.fetches.inc()
        self._send(request, attempt, source)
        return True

    def _send(self, request: Request, attempt: Attempt, fetch: FetchFrom | None) -> None:
        """`Prefill` to P and `Admit` to D, both at once."""
        prefill = self._fleet[attempt.prefill].peer if attempt.prefill is not None else None
        decode = self._fleet[attempt.decode].peer if attempt.decode is not None else None
        for worker, message in assignments(request, attempt, prefill, decode, fetch):
            self._link.send(worker, message)
        mode = "local" if prefill is None else "remote" if decode is not None else "prefill_only"
        self._metrics.placements.labels(mode).inc()
        log.debug(
            "request %s attempt %d: prefill %s, decode %s",
            request.label,
            attempt.number,
            attempt.prefill,
            attempt.decode,
        )

    def _hits(self, request: Request) -> dict[str, int]:
        """Worker id -> tokens of the prompt that its cache holds."""
        kinds = {
            (member.info.content_id, member.info.layout.block_size)
            for member in self._fleet
            if request.content_id in (None, member.info.content_id)
        }
        hits: dict[str, int] = {}
        for content_id, block_size in kinds:
            hashes = request.hashes(content_id, block_size)
            blocks = self._directory.matches(content_id, block_size, hashes)
            hits.update((worker, num * block_size) for worker, num in blocks.items())
        return hits

    def _held(self, request: Request, hits: Mapping[str, int]) -> dict[str, int]:
        """What of that can be fetched: a worker that drains, hangs or failed this request gives
        nothing."""
        return {
            worker: tokens
            for worker, tokens in hits.items()
            if (member := self._fleet.get(worker)) is not None
            and member.state == "ready"
            and worker not in request.avoid
        }

    def _start(self, request: Request, choices: tuple[int, ...]) -> None:
        """Place `choices`, or queue them until a worker comes; first come, first served."""
        self.serve_waiting(before=request)
        if request.over or self._settle(request, choices):
            return
        if self._cannot_fit(request):
            self._fail(request, RequestError(400, "The prompt does not fit into any worker."))
        elif request.next_attempt == 1 and not self._waiting.has_room(request):
            self._fail(request, unavailable("Too many requests wait for a worker."))
        else:
            entry = Entry(request, choices)
            self._limit(entry)
            self._waiting.add(entry)

    def _limit(self, entry: Entry) -> None:
        """End the patience of an entry in time: without workers soon, where they are busy when it
        cannot be answered within its limit any more."""
        request = entry.request
        if not self._is_busy(entry):
            resumes = request.num_outputs > 0
            left_s = self._patience.resume_s if resumes else self._patience.grace_s
            end = self._give_up
        elif request.next_attempt == 1 and self._slo.ttft is not None:
            view = View(num_tokens=len(request.prompt), remaining=1)
            limit_s = ttft_limit(self._slo, view, self._fleet.snapshot())
            left_s = max(0.0, limit_s - (time.monotonic() - request.started))
            end = self._expire
        else:
            return
        loop = asyncio.get_running_loop()
        entry.deadline = loop.time() + left_s
        entry.timer = loop.call_later(left_s, end, entry)

    def _limit_waiting(self) -> None:
        """Workers take nothing new any more: who waited for them alone does not for ever."""
        for entry in self._waiting:
            if entry.timer is None:
                self._limit(entry)

    def _is_busy(self, entry: Entry) -> bool:
        """Workers that could take the entry have all that they can do: one will in time."""
        request = entry.request
        return self._fleet.is_busy(entry.num_tokens, request.content_id, request.refused)

    def _give_up(self, entry: Entry) -> None:
        entry.timer = None
        if self._is_busy(entry):  # workers came, but others were before it
            self._limit(entry)
        else:
            error = unavailable("No worker is ready to serve the request.")
            self._fail(entry.request, error)

    def _expire(self, entry: Entry) -> None:
        self._fail(entry.request, overloaded("No worker was free within the limit.", 1.0))

    def serve_waiting(self, before: Request | None = None) -> None:
        """A decode worker may have a seat: serve who is next. `before`: only those that this
        request must not overtake."""
        if len(self._waiting) and self._fleet.has_seats:
            self._serve(self._waiting if before is None else self._waiting.ahead_of(before))

    def retry_waiting(self) -> None:
        """A worker came, or goes on: what still finds none keeps its place."""
        self._serve(self._waiting)

    def _serve(self, entries: Iterable[Entry]) -> None:
        misses = Misses()
        for entry in entries:
            if entry in misses:
                continue
            if self._settle(entry.request, entry.choices):
                if not entry.request.over:
                    self._waiting.remove(entry)
                continue
            misses.add(entry)
            if entry.timer is None:
                self._limit(entry)

    def _cannot_fit(self, request: Request) -> bool:
        """Every decode worker that is there has refused the request for good."""
        decodes = [
            member.info.id
            for member in self._fleet
            if member.info.role == "decode" and request.content_id in (None, member.info.content_id)
        ]
        return bool(decodes) and request.refused.issuperset(decodes)

    def take(self, worker: str, output: Output) -> None:
        """Hand the new part of an output to its request; answer a stale one by Cancel."""
        request = self._requests.get(output.request)
        attempt = request.attempts.get(output.attempt) if request is not None else None
        if request is None or attempt is None or output.choice not in attempt.choices:
            self._metrics.stale.inc()
            self._link.send(worker, Cancel(output.request, output.attempt))
            return
        if not attempt.prefilled and request.awaits_scores(attempt, worker):
            attempt.early.append(output)
            return
        self._take(worker, output, request, attempt)
        if attempt.early:
            early, attempt.early = attempt.early, []
            for held in early:
                assert attempt.decode is not None
                self.take(attempt.decode, held)

    def _take(self, worker: str, output: Output, request: Request, attempt: Attempt) -> None:
        if not attempt.prefilled:
            self._fleet.prefilled(attempt)
        if attempt.prefill is not None and worker == attempt.decode and not attempt.handed_over:
            self._fleet.handed_over(attempt)
        if attempt.first and output.cached_tokens > request.cached_tokens:
            request.cached_tokens = min(output.cached_tokens, len(request.prompt))
        self._explainer.took(request, attempt, worker, output)
        if output.finish == "grammar":
            self._fail(request, nothing_allowed())
            return
        previous = request.last_token
        try:
            delta = request.take(output)
        except ValueError as error:
            log.warning("request %s, worker %s: %s", request.label, worker, error)
            self.replace(request, attempt, "gap", (worker,))
            return
        except Exception:
            # Whatever one request trips over must not end the others.
            log.exception("request %s cannot be decoded", request.label)
            self._fail(request, internal(request.label))
            return
        if delta is None:
            return
        if previous is None:
            self._explainer.first_token(request, attempt)
        self._observe(request, delta, previous)
        request.events.put_nowait(delta)
        if delta.finish:
            # A stop string is the router's own: the worker knows of no end.
            teller = worker if output.finish else None
            self._finish_choice(request, attempt, output.choice, teller)

    def _observe(self, request: Request, delta: Delta, previous: float | None) -> None:
        assert request.last_token is not None
        if delta.finish:
            self._metrics.vllm.finished(delta.finish)
        if previous is None:
            self._metrics.cached_tokens.inc(request.cached_tokens)
            self._metrics.tokens.first(request.last_token - request.started, len(delta.tokens))
        else:
            self._metrics.tokens.next(request.last_token - previous, len(delta.tokens))

    def _finish_choice(
        self, request: Request, attempt: Attempt, choice: int, teller: str | None
    ) -> None:
        """A choice ended; if it was the last of its attempt, the attempt ends as well.

        `teller`: the worker that ended it; None if the router did.
        """
        if request.unfinished(attempt.choices):
            if teller is None and attempt.decode is not None:
                self._link.send(attempt.decode, Cancel(request.id, attempt.number, (choice,)))
            return
        del request.attempts[attempt.number]
        self._fleet.release(attempt)
        for other in attempt.workers():
            # The teller knows of the end; a prefill worker is done after the handover.
            if teller is None or (other != teller and not attempt.handed_over):
                self._link.send(other, Cancel(request.id, attempt.number))
        if all(choice.finish for choice in request.choices):
            self._end(request, "finished")

    def failed(self, worker: str, message: Failed) -> None:
        """A worker gave an attempt up."""
        request = self._requests.get(message.request)
        attempt = request.attempts.get(message.attempt) if request is not None else None
        if request is None or attempt is None:
            return
        log.warning(
            "request %s attempt %d failed on %s: %s %s",
            request.label,
            attempt.number,
            worker,
            message.reason,
            message.detail,
        )
        suspects = attempt.suspects(worker, message.reason)
        match message.reason:
            case "invalid":
                self._fail(request, internal(request.label))
                return
            case "no_blocks":
                request.refused.add(worker)
            case "draining":
                self.leaving(worker)
            case "transfer" if attempt.pair is not None:
                request.avoid_pairs.add(attempt.pair)
            case "peer" if attempt.pair is not None:
                # Whatever the suspect does with others: not this way again.
                request.avoid_pairs.add(attempt.pair)
                request.avoid.update(suspects)
            case _:
                request.avoid.add(worker)
        self.replace(request, attempt, message.reason, suspects)

    def replace(
        self, request: Request, attempt: Attempt, cause: str, suspects: Sequence[str]
    ) -> None:
        """The one way to go on after a loss: end the attempt, place its choices anew.

        The attempt is over before anything else happens, so that nothing it still sends is
        taken. Tokens that were emitted are part of the new prompt. `suspects`: the workers whose
        failure it was.
        """
        del request.attempts[attempt.number]
        self._fleet.release(attempt)
        for worker in attempt.workers():
            self._link.send(worker, Cancel(request.id, attempt.number))
        self._metrics.resumes.labels(cause).inc()
        delay_s = 0.0
        if cause not in _NO_FAILURE:
            request.blame(attempt, suspects)
            self._fleet.failed(suspects)
            delay_s = self._budget.delay_s(len(self._requests), time.monotonic())
        if request.failures > self._patience.max_resumes:
            self._fail(request, unavailable(f"Workers failed {request.failures} times: {cause}."))
            return
        unfinished = request.unfinished(attempt.choices)
        numbers = tuple(choice.number for choice in unfinished)
        # What was emitted differs: each choice goes on as a sequence of its own.
        apart = any(choice.tokens for choice in unfinished)
        for choices in [(number,) for number in numbers] if apart else [numbers]:
            if delay_s:
                loop = asyncio.get_running_loop()
                loop.call_later(delay_s, self._start_late, request, choices)
            elif not request.over:
                self._start(request, choices)

    def _start_late(self, request: Request, choices: tuple[int, ...]) -> None:
        if not request.over:
            self._start(request, choices)

    def _fail(self, request: Request, error: RequestError) -> None:
        if not request.over:
            log.warning("request %s failed: %s", request.label, error)
            request.events.put_nowait(error)
            self._end(request, "failed")

    def _end(self, request: Request, outcome: str) -> None:
        """Nothing of the request is left behind, here or on a worker."""
        assert not request.over
        request.over = True
        for attempt in request.attempts.values():
            self._fleet.release(attempt)
            for worker in attempt.workers():
                self._link.send(worker, Cancel(request.id, attempt.number))
        request.attempts.clear()
        self._waiting.forget(request)
        del self._requests[request.id]
        self._explainer.ended(request, outcome)
        self._metrics.requests.labels(outcome).inc()
        took_s = time.monotonic() - request.started
        self._metrics.e2e.observe(took_s)
        if outcome == "finished":
            self._metrics.vllm.ended(took_s)
        else:
            self._metrics.vllm.finished("abort" if outcome == "cancelled" else "error")
        self._metrics.live.set(len(self._requests))
        if not self._requests:
            self._idle.set()
