"""`tandem bench sweep`: which topology is best for these SLOs, and is it better than what you have?

    tandem bench sweep --model PATH --topologies colocated,1p1d,1p2d --slo ttft:500ms,tpot:50ms
    tandem bench sweep --topologies 1p1d --url vllm=http://127.0.0.1:8001,model=m --rates 1,2,4

Contenders take turns over the repeats (A B A B), so that a machine whose speed drifts does not
favour one of them; each turn of a topology is a fresh start. All get the same requests at the same
moments.
"""

import argparse
import importlib.util
import json
import math
import secrets
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from benchmarks import contenders, load, machine, stats, sweep_run
from benchmarks.compare.server import StartError, stop_cleanly
from benchmarks.contenders import Contender


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="tandem bench sweep", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = result.add_argument_group("contenders").add_argument
    add("--topologies", default="colocated,1p1d,1p2d,2p1d", help="comma-separated; `none`: none")
    add(
        "--url",
        action="append",
        default=[],
        metavar="NAME=URL[,model=M][,units=N]",
        help="a server that runs already: a rival, or a topology if NAME is such as 1p2d",
    )
    add("--model", help="what the topologies serve; none: the demo model")
    add("--cores", default="", help="of the topologies, such as 0-3; none: all usable ones")
    add("--up-flags", default="", help="further flags of `tandem up`, in one argument")
    add("--start-timeout", type=float, default=600.0, help="seconds until a server must be ready")
    add("--unit", choices=("core", "GPU"), default="core", help="what capacity is told per")
    add("--units", type=float, default=0.0, help="how many of them; 0: the cores")
    add = result.add_argument_group("load").add_argument
    add("--rates", default="auto", help="requests/s, comma-separated; auto: by a short probe")
    add("--point-seconds", type=float, default=30.0, help="requests arrive for this long")
    add("--min-prompts", type=int, default=20, help="requests of a point at least")
    add("--grace", type=float, default=30.0, help="seconds for the last answers of a point; what "
        "is unfinished then is an error")  # fmt: skip
    add("--repeats", type=int, default=3)
    load.add_request_arguments(result)
    load.add_shape_arguments(result)
    add = result.add_argument_group("results").add_argument
    add("--slo", default="ttft:500ms,tpot:50ms", metavar="METRIC:TIME,...")
    add("--attainment", type=float, default=0.9, help="share of requests that must meet them")
    add("--percentile", choices=("mean", *stats.QUANTILES), default="p90",
        help="of TTFT and TPOT in plots and tables")  # fmt: skip
    add("--output", type=Path, help="directory for JSON, plots and report; none: sweep-DATE")
    add("--render", type=Path, metavar="JSON", help="measure nothing: draw an earlier sweep anew")
    result.set_defaults(num_warmups=2)
    return result


def chosen(args: argparse.Namespace, cores: Sequence[int]) -> list[Contender]:
    """All contenders. Raises ValueError."""
    units = args.units or float(len(cores))
    names = [] if args.topologies == "none" else args.topologies.split(",")
    found = [contenders.topology(name.strip(), len(cores), units) for name in names]
    found += [contenders.running(text, units) for text in args.url]
    if not found:
        raise ValueError("nothing to measure: --topologies or --url")
    if len({c.name for c in found}) < len(found):
        raise ValueError("two contenders have the same name")
    return found


def given_rates(text: str) -> list[float]:
    """Ascending; empty for `auto`. Raises ValueError."""
    if text == "auto":
        return []
    try:
        rates = sorted({float(part) for part in text.split(",")})
    except ValueError:
        rates = [0.0]
    if not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"--rates: {text!r} is not auto or a list of rates above 0")
    return rates


def check(args: argparse.Namespace) -> dict[str, float]:
    """The SLOs. Raises ValueError for arguments that make no sense."""
    slo = stats.parse_slo(args.slo)
    if not slo:
        raise ValueError("--slo is empty")
    if not 0 < args.attainment < 1:
        raise ValueError("--attainment must be between 0 and 1")
    if min(args.repeats, args.min_prompts) < 1 or min(args.point_seconds, args.grace) <= 0:
        raise ValueError("--repeats, --min-prompts, --point-seconds, --grace must be above 0")
    load.check(sweep_run.point_arguments(args, 1.0))
    return slo


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every point was measured, 2 for wrong arguments, else 1."""
    args = parser().parse_args(argv)

    def fail(message: object, code: int) -> int:
        print(f"tandem bench sweep: error: {message}", file=sys.stderr)
        return code

    if importlib.util.find_spec("matplotlib") is None:
        return fail("plots need matplotlib: pip install 'tandem[bench]'", 1)
    from benchmarks import report

    if args.render is not None:
        try:
            document = json.loads(args.render.read_text())
            report.write(document, args.output or args.render.parent)
        except (OSError, ValueError, KeyError) as error:
            return fail(f"--render {args.render}: {error!r}", 2)
        return 0
    if args.seed is None:
        args.seed = secrets.randbits(32)
    date = machine.provenance()["date"].replace(":", "").replace("+0000", "Z")
    directory = args.output or Path(f"sweep-{date}")
    in_main = threading.current_thread() is threading.main_thread()  # where signals can be set
    handler = signal.getsignal(signal.SIGTERM)
    try:
        slo = check(args)
        cores = machine.cores(args.cores)
        found = chosen(args, cores)
        rates = given_rates(args.rates)
        for contender in found:
            target = load.target(args, contender.url, contender.model)
            if target.tokenizer is not None and args.vocab_size is None:
                args.vocab_size = target.tokenizer.get_vocab_size()
        sweep_run.point_plan(args, rates[0] if rates else math.inf, 0)
        if args.model is not None and Path(args.model).exists():
            args.model = str(Path(args.model).absolute())
        directory.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    try:
        if in_main:
            stop_cleanly()
        document = sweep_run.sweep(args, found, rates, cores, slo, directory)
    except (StartError, ConnectionError) as error:
        return fail(error, 1)
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, handler)
    if not document["points"]:
        return fail("nothing was measured", 1)
    report.write(document, directory)
    return int(bool(document["failures"]))
