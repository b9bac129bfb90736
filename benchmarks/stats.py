"""Summaries of a run: percentiles, throughput, goodput, confidence intervals over repeats."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.client import Record

QUANTILES = {"median": 50, "p90": 90, "p99": 99}
SLO_METRICS = ("ttft", "tpot", "itl", "e2el")

# Two-sided 95 % quantiles of Student's t for 1..10 degrees of freedom, then the normal one.
_T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def parse_slo(text: str) -> dict[str, float]:
    """`ttft:500ms,tpot:50ms` as {metric: milliseconds}; units ms and s, plain numbers are ms.

    `itl` is a request's largest gap. Raises ValueError with what is wrong.
    """
    result: dict[str, float] = {}
    for part in filter(None, re.split(r"[,\s]+", text)):
        match = re.fullmatch(r"(\w+):([0-9.]+)(ms|s)?", part)
        if match is None or match[1] not in SLO_METRICS:
            known = ", ".join(SLO_METRICS)
            raise ValueError(f"bad SLO {part!r}: expected METRIC:TIME with METRIC one of {known}")
        result[match[1]] = float(match[2]) * (1000.0 if match[3] == "s" else 1.0)
    return result


def meets(record: Record, slo: dict[str, float]) -> bool:
    """Whether a request completed within every limit of `slo` (milliseconds)."""
    if not record.ok:
        return False
    tpot = record.tpot_s
    values = {
        "ttft": record.ttft_s,
        "tpot": 0.0 if tpot is None else tpot,
        "itl": max(record.itl_s, default=0.0),
        "e2el": record.e2e_s,
    }
    return all(values[metric] * 1000.0 <= limit for metric, limit in slo.items())


def distribution(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """`mean_NAME_ms`, `median_NAME_ms`, ...; NaN where there is no value."""
    values = np.asarray(seconds, dtype=np.float64) * 1000.0
    if values.size == 0:
        return {f"{key}_{name}_ms": math.nan for key in ("mean", *QUANTILES)}
    result = {f"mean_{name}_ms": float(values.mean())}
    for key, q in QUANTILES.items():
        result[f"{key}_{name}_ms"] = float(np.percentile(values, q))
    return result


def summarize(records: Sequence[Record], slo: dict[str, float], cpu_share: float) -> dict[str, Any]:
    """All figures of one run.

    Rates are over the time from the first send to the last end. `request_goodput` counts the
    requests that met `slo`; errors and rejections are misses. `send_lag` is how late requests
    left this client, `client_cpu` its share of one core: both say whether it was the bottleneck.
    """
    done = [r for r in records if r.ok]
    start = min((r.sent for r in records), default=0.0)
    end = max((r.ended for r in records), default=0.0)
    duration = max(end - start, 1e-9)
    lags = [r.sent - r.scheduled for r in records]
    result: dict[str, Any] = {
        "duration_s": duration,
        "completed": len(done),
        "errors": sum(1 for r in records if not r.ok and not r.rejected),
        "rejected": sum(1 for r in records if not r.ok and r.rejected),
        "total_input_tokens": sum(r.input_len for r in done),
        "total_output_tokens": sum(r.output_len for r in done),
        "cached_tokens": sum(r.cached_tokens for r in done),
        "request_throughput": len(done) / duration,
        "output_throughput": sum(r.output_len for r in done) / duration,
        "total_token_throughput": sum(r.input_len + r.output_len for r in done) / duration,
        "request_goodput": sum(meets(r, slo) for r in records) / duration,
        "slo_attainment": sum(meets(r, slo) for r in records) / max(len(records), 1),
        **distribution("ttft", [r.ttft_s for r in done]),
        **distribution("tpot", [t for r in done if (t := r.tpot_s) is not None]),
        **distribution("itl", [gap for r in done for gap in r.itl_s]),
        **distribution("e2el", [r.e2e_s for r in done]),
        **distribution("send_lag", lags),
        "client_cpu": cpu_share,
    }
    result["client_limited"] = cpu_share > 0.8 or result["p99_send_lag_ms"] > 20.0
    return result


def intervals(runs: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """95 % confidence intervals of the mean over repeats, for every float of the summaries."""
    if len(runs) < 2:
        return {}
    n = len(runs)
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    result = {}
    for key, first in runs[0].items():
        if not isinstance(first, float):
            continue
        values = np.asarray([run[key] for run in runs])
        half = t * float(values.std(ddof=1)) / math.sqrt(n)
        result[key] = [float(values.mean()) - half, float(values.mean()) + half]
    return result


def table(summary: dict[str, Any]) -> str:
    """A summary for people."""

    def row(label: str, value: Any) -> str:
        shown = f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
        return f"{label:<34}{shown:>14}"

    lines = [
        row("completed requests", summary["completed"]),
        row("errors / rejected", summary["errors"] + summary["rejected"]),
        row("duration (s)", summary["duration_s"]),
        row("input tokens", summary["total_input_tokens"]),
        row("  of them cached", summary["cached_tokens"]),
        row("output tokens", summary["total_output_tokens"]),
        row("requests/s", summary["request_throughput"]),
        row("goodput within SLO (requests/s)", summary["request_goodput"]),
        row("output tokens/s", summary["output_throughput"]),
        row("all tokens/s", summary["total_token_throughput"]),
        "",
        f"{'milliseconds':<14}{'mean':>10}{'median':>10}{'p90':>10}{'p99':>10}",
    ]
    for name in SLO_METRICS:
        cells = "".join(f"{summary[f'{q}_{name}_ms']:>10.2f}" for q in ("mean", *QUANTILES))
        lines.append(f"{name.upper():<14}{cells}")
    lines.append("")
    lines.append(
        f"client: {summary['client_cpu']:.0%} of one core, "
        f"send lag p99 {summary['p99_send_lag_ms']:.1f} ms"
        + ("  ** the client was the bottleneck **" if summary["client_limited"] else "")
    )
    return "\n".join(lines)
