"""The router's Prometheus metrics: every name once, in a registry of their own."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from router.token_metrics import TokenMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_E2E = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)


_ERROR = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)
_TOKENS = (0.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0)
FINISHES: Final = ("stop", "length", "abort", "error")


class VllmMetrics:
    """vLLM's names with vLLM's meanings, summed over all workers, for dashboards that exist."""

    def __init__(self, registry: CollectorRegistry, tokens: TokenMetrics) -> None:
        """`tokens`: has what is counted for every token, under these names too."""
        self._registry = registry
        self._tokens = tokens
        self.running = self._gauge("num_requests_running", "Sequences that workers run")
        self.waiting = self._gauge("num_requests_waiting", "Sequences that wait for a worker")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.success = Counter(
            "vllm:request_success",
            "Choices that ended, by reason",
            ("model_name", "finished_reason"),
            registry=registry,
        )
        self.e2e = self._histogram("e2e_request_latency_seconds", "To the last token", _E2E)
        self._model = ""

    def serve(self, model: str) -> None:
        """The label of every sample."""
        self._model = model
        self._tokens.model = model
        for metric in (self.running, self.waiting, self.prompt_tokens, self.e2e):
            metric.labels(model)
        for reason in FINISHES:
            self.success.labels(model, reason)

    def finished(self, reason: str) -> None:
        self.success.labels(self._model, reason).inc()

    def submitted(self, num_tokens: int) -> None:
        self.prompt_tokens.labels(self._model).inc(num_tokens)

    def ended(self, seconds: float) -> None:
        self.e2e.labels(self._model).observe(seconds)

    def loaded(self, running: int, waiting: int) -> None:
        self.running.labels(self._model).set(running)
        self.waiting.labels(self._model).set(waiting)

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(f"vllm:{name}", help, ("model_name",), registry=self._registry)

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(f"vllm:{name}", help, ("model_name",), registry=self._registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"vllm:{name}", help, ("model_name",), buckets=buckets, registry=self._registry
        )


class Usage:
    """What each tenant used; the tenant is empty where there are none."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, help: str) -> Counter:
            return Counter(f"tandem_router_tenant_{name}", help, ("tenant",), registry=registry)

        self._requests = counter("requests", "Prompts that workers got, by tenant")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of their prompts")
        self._output_tokens = counter("output_tokens", "Tokens that were generated for them")

    def count(self, tenant: str, num_prompt: int, num_outputs: int) -> None:
        """One prompt, when it is over."""
        self._requests.labels(tenant).inc()
        self._prompt_tokens.labels(tenant).inc(num_prompt)
        self._output_tokens.labels(tenant).inc(num_outputs)


class RouterMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Prompts that ended, by outcome", "outcome")
        self.rejected = self._counter("http_errors", "HTTP error answers, by status", "status")
        self.resumes = self._counter("resumes", "Attempts that were placed anew, by cause", "cause")
        self.placements = self._counter("placements", "Attempts by way of prefill", "mode")
        self.fetches = self._counter("fetches", "Attempts that fetch a prefix first")
        self.stale = self._counter("stale_outputs", "Outputs of attempts that are over")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = self._counter(
            "prefix_hit_tokens", "Prompt tokens that a prefix cache held"
        )
        self.predicted_tokens = self._counter(
            "predicted_hit_tokens", "Prompt tokens that placement took to be cached where it went"
        )
        self.ladder = self._gauge(
            "prefix_ladder_tokens", "Prompt tokens that caches could have held, and did", "rung"
        )
        self.ladder_prompt = self._gauge("prefix_ladder_prompt_tokens", "Prompt tokens in all")
        self.ttft_error = self._histogram(
            "ttft_prediction_error", "Predicted against actual, relative to the actual", _ERROR
        )
        self.hit_error = self._histogram(
            "hit_prediction_error_tokens", "Predicted against actually reused tokens", _TOKENS
        )
        self.workers = self._gauge("workers", "Workers that are connected, by role", "role")
        self.live = self._gauge("live_requests", "Prompts that are being served")
        self.waiting = self._gauge("waiting_requests", "Attempts for which there is no worker")
        self.tokens = TokenMetrics()
        self.registry.register(self.tokens)
        self.e2e = self._histogram("e2e_seconds", "Submission to end", _E2E)

        self.vllm = VllmMetrics(self.registry, self.tokens)
        self.usage = Usage(self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"tandem_router_{name}", help, labels, registry=self.registry)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(f"tandem_router_{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"tandem_router_{name}", help, buckets=buckets, registry=self.registry)

    def render(self) -> bytes:
        """The text exposition of all metrics."""
        return generate_latest(self.registry)
