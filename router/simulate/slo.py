"""What a request must meet to count as good."""

from dataclasses import dataclass

from router.slo import Limit, parse_limit, parse_time


@dataclass(frozen=True, slots=True)
class Slo:
    first: Limit
    tpot_s: float

    def ttft(self, uncached_s: float) -> float:
        """The limit of a prompt whose prefill takes `uncached_s` seconds without any cache."""
        return self.first.of(uncached_s)


def parse(ttft: str, tpot: str) -> Slo:
    """`2s+1.5x` or `500ms`, and `50ms`. Raises ConfigError."""
    return Slo(parse_limit(ttft, "--slo-ttft"), parse_time(tpot, "--slo-tpot"))
