"""Summaries of a run: percentiles, throughput, goodput, confidence intervals over repeats."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.client import Record
from benchmarks.run import Run

QUANTILES = {"median": 50, "p90": 90, "p99": 99}
SLO_METRICS = ("ttft", "tpot", "itl", "e2el")

MOST_CPU = 0.8
MOST_LAG_MS = 20.0
"""Above either of them, the client is said to be the bottleneck."""

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
    """Whether a request completed within every limit of `slo` (milliseconds).

    Time that it waited for its turn in this client counts: a user would have waited, too.
    """
    if not record.ok:
        return False
    tpot = record.tpot_s
    waited = record.sent - record.due
    values = {
        "ttft": waited + record.ttft_s,
        "tpot": 0.0 if tpot is None else tpot,
        "itl": max(record.itl_s, default=0.0),
        "e2el": waited + record.e2e_s,
    }
    return all(values[metric] * 1000.0 <= limit for metric, limit in slo.items())


def distribution(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """`mean_NAME_ms`, `median_NAME_ms`, ...; None where there is no value."""
    values = np.asarray(seconds, dtype=np.float64) * 1000.0
    if values.size == 0:
        return {f"{key}_{name}_ms": None for key in ("mean", *QUANTILES)}
    result: dict[str, float | None] = {f"mean_{name}_ms": float(values.mean())}
    for key, q in QUANTILES.items():
        result[f"{key}_{name}_ms"] = float(np.percentile(values, q))
    return result


def summarize(run: Run, slo: dict[str, float]) -> dict[str, Any]:
    """All figures of one run.

    Rates are over the time from the first send to the last end. TTFT counts from the moment in
    which a request was sent. `request_goodput` counts the requests that met `slo`; errors and
    rejections are misses. `send_lag` is how late requests left this client by its own fault,
    `client_cpu` its share of one core: both say whether it was the bottleneck. `held` is how long
    `max_concurrency` held requests back that were due.
    """
    records = run.records
    done = [r for r in records if r.ok]
    start = min((r.sent for r in records), default=0.0)
    end = max((r.ended for r in records), default=0.0)
    duration = max(end - start, 1e-9)
    met = sum(meets(r, slo) for r in records)
    result: dict[str, Any] = {
        "duration_s": duration,
        "completed": len(done),
        "errors": sum(1 for r in records if not r.ok and not r.rejected),
        "rejected": sum(1 for r in records if not r.ok and r.rejected),
        "not_due": run.not_due,
        "total_input_tokens": sum(r.input_len for r in done),
        "total_output_tokens": sum(r.output_len for r in done),
        "cached_tokens": sum(r.cached_tokens for r in done),
        "request_throughput": len(done) / duration,
        "output_throughput": sum(r.output_len for r in done) / duration,
        "total_token_throughput": sum(r.input_len + r.output_len for r in done) / duration,
        "request_goodput": met / duration,
        "slo_attainment": met / max(len(records), 1),
        **distribution("ttft", [r.ttft_s for r in done]),
        **distribution("tpot", [t for r in done if (t := r.tpot_s) is not None]),
        **distribution("itl", [gap for r in done for gap in r.itl_s]),
        **distribution("e2el", [r.e2e_s for r in done]),
        **distribution("send_lag", [r.lag_s for r in records]),
        **distribution("held", [r.held_s for r in records]),
        "client_cpu": run.cpu_share,
        "answers_unknown": run.answers_unknown,
    }
    lag = result["p99_send_lag_ms"]
    result["client_limited"] = run.cpu_share > MOST_CPU or (lag is not None and lag > MOST_LAG_MS)
    return result


def combine(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One summary of all repeats: counts are summed, figures averaged over the repeats that have
    them, with 95 % confidence intervals; flags hold if they held once."""
    if len(summaries) == 1:
        return dict(summaries[0])
    result: dict[str, Any] = {}
    for key in summaries[0]:
        values = [s[key] for s in summaries if s[key] is not None]
        if not values:
            result[key] = None
        elif isinstance(values[0], bool):
            result[key] = any(values)
        elif isinstance(values[0], int):
            result[key] = sum(values)
        else:
            result[key] = float(np.mean(values))
    return result | {"confidence_95": intervals(summaries), "repeats": len(summaries)}


def intervals(runs: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """95 % confidence intervals of the mean over repeats, of figures that two or more have."""
    result = {}
    for key in runs[0]:
        values = np.asarray([run[key] for run in runs if isinstance(run[key], float)])
        if (n := values.size) < 2:
            continue
        t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
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
        cells = (_cell(summary[f"{q}_{name}_ms"]) for q in ("mean", *QUANTILES))
        lines.append(f"{name.upper():<14}{''.join(cells)}")
    lines.append("")
    lag = _cell(summary["p99_send_lag_ms"]).strip()
    lines.append(f"client: {summary['client_cpu']:.0%} of one core, send lag p99 {lag} ms")
    if summary["client_limited"]:
        lines.append("** The client was the bottleneck: these are not figures of the server. **")
    if (held := summary["p99_held_ms"]) is not None and held > MOST_LAG_MS:
        lines.append(
            f"--max-concurrency held requests back, p99 {held:,.0f} ms; goodput counts it."
        )
    if summary["answers_unknown"]:
        lines.append("The server returns no token ids: later turns continued made-up answers.")
    if summary["not_due"]:
        lines.append(f"Cut at the time limit: {summary['not_due']} requests were never due.")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value:>10.2f}"
