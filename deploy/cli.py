"""The `tandem` command: reads the configuration of one role and runs it.

Each role is imported only when it is asked for: `tandem --help` is quick and the router never
loads torch. A ConfigError ends the process with one line on stderr.
"""

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from common.config import RouterConfig, UpConfig, WorkerConfig
from common.errors import ConfigError, UsageError
from common.flags import parse

HELP = """\
usage: tandem COMMAND [flags]

Serves large language models with prefill and decode on separate worker pools.

commands:
  up        a whole deployment on this machine: Redis, workers and a router
  router    one router: the OpenAI-compatible HTTP server
  prefill   one prefill worker
  decode    one decode worker
  bench     measure servers: `tandem bench serve`, `tandem bench sweep`
  doctor    check this machine, and a deployment that runs: what is in the way
  keygen    make a CurveZMQ key pair: `tandem keygen NAME [DIRECTORY]`
  simulate  what a deployment would do under a recorded load
  version   print the version

`tandem COMMAND --help` lists the flags of a command."""

COMMANDS = ("up", "router", "prefill", "decode", "bench", "doctor", "keygen", "simulate")
"""Whose name is part of an error line."""
BENCHMARKS = ("serve", "sweep")


def version() -> str:
    try:
        return importlib.metadata.version("tandem")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        import tomllib

        project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
        return str(project["project"]["version"])


def _require(config: WorkerConfig | RouterConfig) -> str:
    """The Redis URL of a role that runs on its own. Raises UsageError, ConfigError."""
    from deploy.redis_server import check

    if config.model is None:
        raise UsageError("--model is missing")
    if config.redis is None:
        raise UsageError("--redis is missing")
    check(config.redis)
    return config.redis


def _up(argv: Sequence[str]) -> int:
    config = parse(UpConfig, argv, "tandem up")
    from deploy import up

    return up.main(config)


def _router(argv: Sequence[str]) -> int:
    config = parse(RouterConfig, argv, "tandem router")
    _require(config)
    from router.main import main as run

    return run(config)


def _worker(role: str, argv: Sequence[str]) -> int:
    config = parse(WorkerConfig, argv, f"tandem {role}")
    _require(config)
    if config.pin_cores is not None:
        # Before the model code is imported, so that every thread it starts inherits the cores.
        from deploy.resources import pinned_cores

        os.sched_setaffinity(0, pinned_cores(config.pin_cores))
    if role == "prefill":
        from prefill.worker import main as run
    else:
        from decode.worker import main as run
    return run(config)


def _bench(argv: Sequence[str]) -> int:
    if not argv or argv[0] not in BENCHMARKS:
        raise UsageError(f"expected `tandem bench {'|'.join(BENCHMARKS)}`")
    if argv[0] == "serve":
        from benchmarks.serve import main as run
    else:
        from benchmarks.sweep import main as run
    return run(argv[1:])


def _doctor(argv: Sequence[str]) -> int:
    from deploy.doctor import DoctorConfig
    from deploy.doctor import main as run

    return run(parse(DoctorConfig, argv, "tandem doctor"))


def _keygen(argv: Sequence[str]) -> int:
    if not 1 <= len(argv) <= 2 or argv[0].startswith("-"):
        raise UsageError("expected `tandem keygen NAME [DIRECTORY]`")
    from common.curve import generate

    public, secret = generate(Path(argv[1] if len(argv) == 2 else "."), argv[0])
    print(
        f"{secret}  for its process alone: --curve-key\n{public}  for --curve-allow of the others"
    )
    return 0


def _simulate(argv: Sequence[str]) -> int:
    from router.simulate.config import SimulateConfig
    from router.simulate.main import main as run

    return run(parse(SimulateConfig, argv, "tandem simulate"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 (cannot run as configured), 2 (usage)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else 2
    command, *rest = arguments
    try:
        match command:
            case "up":
                return _up(rest)
            case "router":
                return _router(rest)
            case "prefill" | "decode":
                return _worker(command, rest)
            case "bench":
                return _bench(rest)
            case "doctor":
                return _doctor(rest)
            case "keygen":
                return _keygen(rest)
            case "simulate":
                return _simulate(rest)
            case "version" | "--version":
                print(f"tandem {version()}")
                return 0
            case _:
                raise UsageError(f"unknown command {command!r} (see tandem --help)")
    except ConfigError as error:
        known = command in COMMANDS
        print(f"tandem{f' {command}' if known else ''}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
