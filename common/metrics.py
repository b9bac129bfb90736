"""Every Prometheus metric of a worker, named once, and the text that /metrics answers.

Counters and histograms are updated by the thread in which the event happens; the client library
is safe for that. Labels are bounded: no request, router or peer in any of them.
"""

from dataclasses import fields
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from common.messages import Ledger, Load

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
BLOCK_STATES = ("free", "cached", "in_use", "leased", "receiving", "draining")


class WorkerMetrics:
    """The metrics of one worker process, in a registry of their own."""

    def __init__(self, role: str) -> None:
        self.registry = CollectorRegistry()
        prompt = self._counter(
            "prompt_tokens", "Prompt tokens by where their KV came from", "source"
        )
        self.computed_tokens = prompt.labels("computed")
        self.cached_tokens = prompt.labels("cached")
        self.generated_tokens = self._counter("generated_tokens", "Tokens that were sampled")
        self.fetched_tokens = self._counter(
            "fetched_tokens", "Tokens whose KV was fetched from the cache of another worker"
        )
        self.fetches = self._counter("fetches", "Fetches of cached prefixes", "outcome")
        self.steps = self._counter("engine_steps", "Engine steps")
        self.step_seconds = Histogram(
            "tandem_step_seconds",
            "Time of one engine step",
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        self.cancel_to_free = Histogram(
            "tandem_cancel_to_free_seconds",
            "From a router's Cancel to the end of all computing for it",
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        self.preemptions = self._counter("preemptions", "Sequences that gave their blocks up")
        self.requests = self._counter("requests", "Attempts that ended here", "outcome")
        self.dropped = self._counter("dropped_messages", "Messages of unknown attempts", "kind")
        self.resets = self._counter("resets", "Pauses longer than the lease")
        self.running = self._gauge("running", "Sequences that are computed")
        self.waiting = self._gauge("waiting", "Sequences that wait for blocks or for their KV")
        self.blocks = self._gauge("kv_blocks", "Blocks of the KV pool by state", "state")
        self.transfers = self._gauge(
            "transfer", "Counters of the KV transfers since start", "counter", "reason"
        )
        self.info = self._gauge("worker", "Always 1; the role of this worker", "role")
        self.info.labels(role).set(1)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"tandem_{name}", help, labels, registry=self.registry)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(f"tandem_{name}", help, labels, registry=self.registry)

    def show(self, load: Load, ledger: Ledger) -> None:
        """Take over the gauges of the engine, after a step."""
        self.running.set(load.running)
        self.waiting.set(load.waiting)
        for state in BLOCK_STATES:
            self.blocks.labels(state).set(getattr(ledger, state))

    def show_transfers(self, stats: "DataclassInstance") -> None:
        """Take over the counters of the transfer endpoint: numbers, and counts by reason."""
        for field in fields(stats):
            value = getattr(stats, field.name)
            counts = value if isinstance(value, dict) else {"": value}
            for reason, count in counts.items():
                self.transfers.labels(field.name, reason).set(count)

    def render(self) -> bytes:
        """The text exposition of all metrics."""
        return generate_latest(self.registry)
