"""The results of a sweep as files: JSON, plots, and one HTML page that needs nothing but itself.

Called by `benchmarks.sweep`, after measuring or with `--render`.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import curves, plots
from benchmarks.advice import Advice, advise, goals, number
from benchmarks.curves import Curve, Estimate

STYLE = Path(__file__).with_name("report.css")
CAPTIONS = {
    "tradeoff": (
        "Time to first token against time per output token",
        "Each point is one request rate; down and to the left is better. Thick bars are 95\u00a0% "
        "intervals over the repeats. A point inside the green region holds both SLOs at the "
        "{percentile}.",
    ),
    "goodput": (
        "Goodput against rate",
        "Requests per second that met every SLO: the rate times the share that did. On the dashed "
        "line all of them did; where a curve leaves it, the service is at its limit. Errors and "
        "rejections are misses. Bands are 95\u00a0% intervals.",
    ),
    "attainment": (
        "Attainment per {unit}",
        "Share of the requests within the SLOs, against the rate divided by the {unit}s. Beside a "
        "name: the rate per {unit} up to which the goal is met (dotted).",
    ),
}


def write(document: Mapping[str, Any], directory: Path) -> None:
    """Write everything into `directory` and say so. Raises KeyError for a document of another kind,
    OSError."""
    found = curves.build(document)
    advice = advise(found, document["slo"], document["attainment"], document["unit"])
    pictures = plots.draw(
        found, document["slo"], document["attainment"], document["percentile"], document["unit"]
    )
    directory.mkdir(parents=True, exist_ok=True)
    saved = {**document, "advice": [advice.headline, *advice.details]}
    (directory / "sweep.json").write_text(json.dumps(saved, indent=1) + "\n")
    for name, picture in pictures.items():
        (directory / f"{name}.svg").write_text(picture.svg)
        (directory / f"{name}.png").write_bytes(picture.png)
    drawn = {name: picture.page for name, picture in pictures.items()}
    (directory / "report.html").write_text(page(document, found, advice, drawn))
    print("\n".join(["", advice.headline, *(f"  {line}" for line in advice.details)]))
    print(f"\n{directory / 'report.html'}")


def page(
    document: Mapping[str, Any], found: Sequence[Curve], advice: Advice, svgs: Mapping[str, str]
) -> str:
    """The report as HTML."""
    names = {"percentile": document["percentile"], "unit": document["unit"]}
    figures = "\n".join(
        f"<figure><h2>{title.format(**names)}</h2>{inline(svg, name)}"
        f"<figcaption>{_text(caption.format(**names))}</figcaption></figure>"
        for name, svg in svgs.items()
        for title, caption in [CAPTIONS[name]]
    )
    details = "".join(f"<li>{_text(line)}</li>" for line in advice.details)
    warnings = "".join(f"<li>{_text(line)}</li>" for line in doubts(document, found))
    doubt = f'<section class="doubt"><h2>Read with care</h2><ul>{warnings}</ul></section>'
    ratios = f'<p class="note">Ratios are to {_text(found[0].name)}; above 1 is better.</p>'
    machine = document["machine"]
    facts = {
        "Goal": f"{goals(document['slo'])} for {document['attainment']:.0%} of the requests",
        "Load": document["load"],
        "Machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB, "
        f"{machine['system']}",
        "Date": document["date"],
        "Commit": document["commit"],
        "Versions": ", ".join(f"{name} {v}" for name, v in document["versions"].items()),
        "Command": document["command"],
        "Seed": str(document["seed"]),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Tandem sweep: TTFT against TPOT</title>
<style>
{STYLE.read_text()}</style>
</head>
<body>
<main>
<header><p class="kicker">Tandem sweep, {_text(document["date"][:10])}</p>
<h1>{_text(advice.headline)}</h1>
<ul>{details}</ul></header>
{doubt if warnings else ""}
{figures}
<section><h2>Capacity</h2>{capacity_table(found, document["unit"])}{ratios}</section>
<section><h2>Every point</h2>{point_table(found, document["percentile"])}{ratios}</section>
<section><h2>Where this comes from</h2><dl>{rows}</dl></section>
</main>
</body>
</html>
"""


def inline(svg: str, name: str) -> str:
    """A picture as part of a page: without its prolog and size, its ids its own, its colours those
    of the page's theme."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    # A page shows no more than hundredths of a point, in fonts as wide as the plots' own.
    svg = re.sub(r' d="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), svg)
    svg = svg.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    svg = svg.replace('id="', f'id="{name}-').replace('href="#', f'href="#{name}-')
    svg = svg.replace("url(#", f"url(#{name}-")
    roles = {"ink": plots.INK, "muted": plots.MUTED, "grid": plots.GRID, "paper": plots.PAPER,
             "goal": plots.GOAL}  # fmt: skip
    colours = {colour: f"var(--{role})" for role, colour in roles.items()}
    colours |= {colour: f"var(--s{i})" for i, colour in enumerate(plots.SERIES)}
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda match: colours.get(match[0], match[0]), svg)
    label = CAPTIONS[name][0].format(unit="core")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def doubts(document: Mapping[str, Any], found: Sequence[Curve]) -> list[str]:
    """What a reader must know before believing the figures."""
    lines = list(document["failures"])
    if document["busy_share"] > 0.1:
        lines.append(f"The machine was {document['busy_share']:.0%} busy before anything started.")
    if len({point["repeat"] for point in document["points"]}) == 1:
        lines.append("One repeat only: its intervals know nothing of how runs differ.")
    for curve in found:
        if not curve.pinned:
            workers = curve.prefill + curve.decode
            lines.append(
                f"{curve.name} has {workers} workers on fewer cores: they share them, unpinned."
            )
        if any(sample.client_limited for sample in curve.samples):
            lines.append(f"At some rate of {curve.name} the load client was itself the bottleneck.")
    return lines


def capacity_table(found: Sequence[Curve], unit: str) -> str:
    """How much each holds within the SLOs, and its ratio to the first."""
    head = ["", "", "requests/s within the SLOs", f"per {unit}", "95\u00a0% interval", "ratio"]
    first = found[0].per_unit.value
    body = []
    for index, curve in enumerate(found):
        rate = curve.capacity.rate
        sign = "\u2265 " if curve.capacity.at_least else ""
        body.append([
            _swatch(index), _text(curve.name), sign + number(rate.value),
            sign + number(curve.per_unit.value), _interval(rate),
            _ratio(curve.per_unit.value, first),
        ])  # fmt: skip
    return _table(head, body)


def point_table(found: Sequence[Curve], percentile: str) -> str:
    """Every sample, with ratios to the first contender at the same rate (above 1 is better)."""
    head = ["", "", "requests/s", f"TTFT {percentile} ms", "ratio",
            f"TPOT {percentile} ms", "ratio", "within SLOs", "goodput /s", "tokens/s",
            "failed"]  # fmt: skip
    first = {sample.rate: sample for sample in found[0].samples}
    body = []
    for index, curve in enumerate(found):
        for place, sample in enumerate(curve.samples):
            base = first.get(sample.rate)
            body.append([
                _swatch(index), _text(curve.name) if place == 0 else "", f"{sample.rate:g}",
                _value(sample.ttft), _better(base.ttft if base else None, sample.ttft),
                _value(sample.tpot), _better(base.tpot if base else None, sample.tpot),
                f"{sample.attainment.value:.0%}", number(sample.goodput.value),
                number(sample.output_throughput), f"{sample.failed:,}",
            ])  # fmt: skip
    return _table(head, body)


def _better(base: Estimate | None, value: Estimate | None) -> str:
    return "-" if base is None or value is None else _ratio(base.value, value.value)


def _ratio(above: float, below: float) -> str:
    return f"\u00d7{above / below:.2f}" if below > 0 else "-"


def _value(estimate: Estimate | None) -> str:
    return "-" if estimate is None else number(estimate.value)


def _interval(estimate: Estimate) -> str:
    if estimate.low == estimate.high:
        return "-"
    return f"{number(estimate.low)} \u2013 {number(estimate.high)}"


def _swatch(index: int) -> str:
    return f'<i style="background:var(--s{index % len(plots.SERIES)})"></i>'


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body)
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _text(value: str) -> str:
    return html.escape(value)
