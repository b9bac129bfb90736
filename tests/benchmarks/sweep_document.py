"""A small sweep, as `benchmarks.sweep` keeps it: two topologies and a rival at three rates."""

from typing import Any

RATES = (1.0, 2.0, 4.0)
SHARES = {"colocated": (1.0, 1.0, 0.4), "1P1D": (1.0, 1.0, 0.95), "old": (1.0, 0.4, 0.0)}
WORKERS = {"colocated": (0, 1), "1P1D": (1, 1), "old": (0, 0)}


def document() -> dict[str, Any]:
    """Two repeats, the second of which is a little slower."""
    points = [
        {"contender": name, "rate": rate, "repeat": repeat,
         "figures": _figures(rate, shares[place], repeat)}
        for repeat in range(2) for name, shares in SHARES.items()
        for place, rate in enumerate(RATES)
    ]  # fmt: skip
    contenders = [
        {"name": name, "units": 2.0, "prefill": prefill, "decode": decode, "pinned": True}
        for name, (prefill, decode) in WORKERS.items()
    ]
    return {
        "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789ab", "command": "tandem <sweep>",
        "machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 4.0, "system": "Linux"},
        "versions": {"python": "3.11"}, "busy_share": 0.02, "seed": 7, "unit": "core",
        "slo": {"ttft": 500.0, "tpot": 50.0}, "attainment": 0.9, "percentile": "p90",
        "load": "random: 256 in, 64 out", "contenders": contenders, "failures": [],
        "points": points,
    }  # fmt: skip


def _figures(rate: float, share: float, repeat: int) -> dict[str, Any]:
    return {
        "completed": 20, "errors": 0 if share else 5, "rejected": 0, "slo_attainment": share,
        "p90_ttft_ms": rate * (55.0 + 10 * repeat), "p90_tpot_ms": 20.0 + rate + repeat,
        "output_throughput": rate * 64, "client_limited": False,
    }  # fmt: skip
