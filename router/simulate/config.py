"""Flags of `tandem simulate`."""

from dataclasses import dataclass

from common.config import flag
from common.errors import ConfigError
from router.simulate.experiment import WARM_UP
from router.simulate.policies import POLICIES


@dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """What a deployment would do under a load, by the router's own placement."""

    trace: str | None = flag(
        None, "Mooncake-format trace (jsonl or jsonl.gz), or synthetic[:name=value,...]"
    )
    part: str = flag("0:1", "which part of the trace is served, such as 0.5:1 for its second half")
    prefill: int = flag(8, "prefill workers; 0: the decode workers prefill all")
    decode: int = flag(4, "decode workers")
    policy: str = flag(
        "tandem", f"rules of placement, separated by commas, or all: {', '.join(POLICIES)}"
    )
    warm_up: float = flag(
        WARM_UP, "part of the requests that is served first and does not count: caches are cold"
    )
    rate_scale: float = flag(1.0, "how many times as fast as recorded the requests come")
    slo_ttft: str = flag(
        "2s+1.5x", "limit of the first token: a time, and times the prompt's uncached prefill"
    )
    slo_tpot: str = flag("50ms", "limit of the mean time per output token")
    model_json: str | None = flag(
        None, "costs and sizes of a worker; none: Llama-3-70B on 8 x H200"
    )
    staleness_s: float = flag(0.0, "how late the index learns what workers store and evict")
    fail: str = flag("", "workers that fail, such as p0@100,d1@50+20 (+ seconds until it is back)")
    search: bool = flag(False, "find g90 and g99: the highest rates at which 90 and 99 % are good")
    seed: int = flag(0, "of arrivals within a tick of the trace, and of ties")
    json: str | None = flag(None, "write the results to this file; - : standard output")
    plots: str | None = flag(None, "write plots to this directory (needs matplotlib)")
    progress: bool = flag(True, "progress bar on a terminal")

    def __post_init__(self) -> None:
        if self.prefill < 0 or self.decode < 1:
            raise ConfigError("--prefill must not be negative, and --decode at least 1")
        if not self.rate_scale > 0:
            raise ConfigError("--rate-scale must be positive")
        if not 0 <= self.warm_up < 1:
            raise ConfigError("--warm-up must be at least 0 and below 1")
        if not self.staleness_s >= 0:
            raise ConfigError("--staleness-s must not be negative")
        self.bounds()
        if "pooled" in self.policies() and not self.prefill:
            raise ConfigError("--policy pooled needs --prefill workers")

    def bounds(self) -> tuple[float, float]:
        """Where the part of the trace begins and ends, from 0 to 1. Raises ConfigError."""
        start, _, end = self.part.partition(":")
        try:
            bounds = float(start), float(end)
        except ValueError:
            bounds = 1.0, 0.0
        if not 0 <= bounds[0] < bounds[1] <= 1:
            raise ConfigError(f"--part: {self.part!r} is no part such as 0.5:1")
        return bounds

    def policies(self) -> list[str]:
        """Names of the policies. Raises ConfigError."""
        names = list(POLICIES) if self.policy == "all" else self.policy.split(",")
        for name in names:
            if name not in POLICIES:
                raise ConfigError(f"--policy: {name!r} is none of {', '.join(POLICIES)}")
        return names
