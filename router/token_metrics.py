"""What is counted for every token, as plain numbers: Prometheus samples when somebody asks.

The client library's counters and histograms take longer per token than all else that a router does
with it. Both names of each figure, ours and vLLM's, are made from one count. Owned by
`router.metrics`.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Final

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

TTFT: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
ITL: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)


class Series:
    """A histogram: `counts[i]` values up to `bounds[i]`, the last of them above all bounds."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, help: str, labels: dict[str, str]) -> HistogramMetricFamily:
        """Its samples now."""
        family = HistogramMetricFamily(name, help, labels=list(labels))
        buckets, total = [], 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append((str(bound) if bound < float("inf") else "+Inf", float(total)))
        family.add_metric(list(labels.values()), buckets, self._sum)
        return family


class TokenMetrics(Collector):
    """`model` is the label of vLLM's names; empty: they are not shown."""

    def __init__(self) -> None:
        self.model = ""
        self._tokens = 0
        self._ttft = Series(TTFT)
        self._itl = Series(ITL)

    def first(self, seconds: float, num_tokens: int) -> None:
        """The first output of a prompt, so long after its submission."""
        self._tokens += num_tokens
        self._ttft.observe(seconds)

    def next(self, seconds: float, num_tokens: int) -> None:
        """One more output, so long after the one before."""
        self._tokens += num_tokens
        self._itl.observe(seconds)

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily(
            "tandem_router_output_tokens", "Tokens that were generated", self._tokens
        )
        names = {"ttft": "tandem_router_ttft_seconds", "itl": "tandem_router_itl_seconds"}
        yield self._ttft.family(names["ttft"], "Submission to first token", {})
        yield self._itl.family(names["itl"], "Time between outputs of a prompt", {})
        if not self.model:
            return
        labels = {"model_name": self.model}
        tokens = CounterMetricFamily(
            "vllm:generation_tokens", "Tokens that were generated", labels=list(labels)
        )
        tokens.add_metric(list(labels.values()), self._tokens)
        yield tokens
        yield self._ttft.family("vllm:time_to_first_token_seconds", "To the first token", labels)
        yield self._itl.family("vllm:inter_token_latency_seconds", "Between two tokens", labels)
