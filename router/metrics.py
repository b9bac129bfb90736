"""The router's Prometheus metrics: every name once, in a registry of their own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_ITL = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
_E2E = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)


class RouterMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Prompts that ended, by outcome", "outcome")
        self.rejected = self._counter("http_errors", "HTTP error answers, by status", "status")
        self.resumes = self._counter("resumes", "Attempts that were placed anew, by cause", "cause")
        self.placements = self._counter("placements", "Attempts by way of prefill", "mode")
        self.stale = self._counter("stale_outputs", "Outputs of attempts that are over")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = self._counter(
            "prefix_hit_tokens", "Prompt tokens that a prefix cache held"
        )
        self.output_tokens = self._counter("output_tokens", "Tokens that were generated")
        self.workers = self._gauge("workers", "Workers that are connected, by role", "role")
        self.live = self._gauge("live_requests", "Prompts that are being served")
        self.waiting = self._gauge("waiting_requests", "Attempts for which there is no worker")
        self.ttft = self._histogram("ttft_seconds", "Submission to first token", _TTFT)
        self.itl = self._histogram("itl_seconds", "Time between outputs of a prompt", _ITL)
        self.e2e = self._histogram("e2e_seconds", "Submission to end", _E2E)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"tandem_router_{name}", help, labels, registry=self.registry)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(f"tandem_router_{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"tandem_router_{name}", help, buckets=buckets, registry=self.registry)

    def render(self) -> bytes:
        """The text exposition of all metrics."""
        return generate_latest(self.registry)
