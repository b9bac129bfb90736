"""The report of a sweep: complete in itself, well-formed, and readable in a real browser."""

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import curves, plots, report, sweep
from tests.benchmarks.sweep_document import document

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    report.write(document(), directory)
    return directory


def test_files(written: Path) -> None:
    names = {f"{name}.{kind}" for name in report.CAPTIONS for kind in ("svg", "png")}
    assert {path.name for path in written.iterdir()} == names | {"sweep.json", "report.html"}
    for name in names:
        head = (written / name).read_bytes()[:200]
        assert head.startswith(b"\x89PNG\r\n" if name.endswith("png") else b"<?xml")
    kept = json.loads((written / "sweep.json").read_text())
    assert kept["advice"][0].startswith("Best for TTFT")
    assert kept["points"] == document()["points"]


def test_the_page_needs_nothing_else(written: Path) -> None:
    page = (written / "report.html").read_text()
    links = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<script" not in page and "@import" not in page
    assert "Requests sent (per second)</text>" in page, "what an axis says can be searched"
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:href="|url\()#([^")]+)', page))
    assert references and references <= set(ids)


def test_the_page_tells_everything(written: Path) -> None:
    page = (written / "report.html").read_text()
    for text in ("2026-01-02", "0123456789ab", "tandem &lt;sweep&gt;", "A CPU, 2 cores",
                 "TTFT \u2264 500 ms", "P:D = 1:1", "\u00d71.71", "1P1D", "colocated"):  # fmt: skip
        assert text in page, text
    assert "Read with care" not in page
    doubtful = document() | {"busy_share": 0.5, "failures": ["old: gone"]}
    doubtful["contenders"][1]["pinned"] = False
    lines = report.doubts(doubtful, curves.build(doubtful))
    assert lines == [
        "old: gone",
        "The machine was 50% busy before anything started.",
        "1P1D has 2 workers on fewer cores: they share them, unpinned.",
    ]


def test_pictures_follow_the_theme() -> None:
    drawn = plots.draw(curves.build(document()), {"ttft": 500.0}, 0.9, "p90", "core")
    for name, picture in drawn.items():
        ElementTree.fromstring(picture.svg)
        part = report.inline(picture.page, name)
        ElementTree.fromstring(part)
        for role in ("ink", "grid", "s0", "s1", "s2"):
            assert f"var(--{role})" in part
        assert not set(re.findall(r"#[0-9a-f]{6}\b", part)) & {plots.INK, *plots.SERIES}
        assert ' width="' not in part[: part.index(">")]
    again = plots.draw(curves.build(document()), {"ttft": 500.0}, 0.9, "p90", "core")
    assert again["goodput"] == drawn["goodput"]


def test_answers_that_came_all_at_once_have_no_place_on_the_scale() -> None:
    found = document()
    for point in found["points"]:
        if point["contender"] != "old":
            point["figures"]["p90_tpot_ms"] = 0.0
    drawn = plots.draw(curves.build(found), {"ttft": 500.0}, 0.9, "p90", "core")
    assert all(ElementTree.fromstring(picture.svg) is not None for picture in drawn.values())


def test_an_earlier_sweep_is_drawn_anew(written: Path, tmp_path: Path) -> None:
    argv = ["--render", str(written / "sweep.json"), "--output", str(tmp_path)]
    assert sweep.main(argv) == 0
    assert (tmp_path / "report.html").read_text() == (written / "report.html").read_text()


def test_a_file_that_is_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    assert sweep.main(["--render", str(path)]) == 2
    error = capsys.readouterr().err
    assert error == f"tandem bench sweep: error: --render {path}: KeyError('contenders')\n"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(written: Path, tmp_path: Path, scheme: str) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} is installed")
    from PIL import Image

    picture = tmp_path / "page.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,2600", *dark,
         f"--screenshot={picture}", (written / "report.html").as_uri()],
        check=True, timeout=120, capture_output=True,
    )  # fmt: skip
    with Image.open(picture) as image:
        shown = image.convert("RGB")
    assert shown.size == (1000, 2600)
    counts = {colour: count for count, colour in shown.getcolors(1 << 24) or []}
    css = report.STYLE.read_text()
    light, at_night = css.split("@media (prefers-color-scheme: dark)")
    theme = at_night if scheme == "dark" else light

    def pixels(role: str) -> int:
        match = re.search(rf"--{role}: #(\w\w)(\w\w)(\w\w);", theme)
        assert match is not None
        red, green, blue = (int(part, 16) for part in match.groups())
        return counts.get((red, green, blue), 0)

    # Page and paper fill it, letters and each line of the plots are there in their colours.
    assert pixels("page") > 100_000 and pixels("paper") > 500_000
    assert pixels("ink") > 3_000
    assert min(pixels(f"s{i}") for i in range(3)) > 500


def test_a_clear_word_without_matplotlib(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from benchmarks import sweep; sys.exit(sweep.main(['--topologies', 'none']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "tandem bench sweep: error: plots need matplotlib: pip install 'tandem[bench]'\n"
    )
