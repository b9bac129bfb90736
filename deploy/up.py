"""`tandem up`: a whole deployment on this machine as children of this process.

1. check what can be checked early: the port, a given Redis, the model's configuration
2. start Redis, then workers and router, each with its share of the machine
3. when all are ready, print how to reach them; start again whatever ends
4. on Ctrl-C or SIGTERM end them in order: router, workers, Redis

This process imports no torch.
"""

import asyncio
import dataclasses
import json
import secrets
import signal
import sys
from pathlib import Path
from typing import Any, TypeVar

from common import log, random_model
from common.config import RouterConfig, UpConfig, WorkerConfig
from common.errors import ConfigError
from common.flags import to_argv, to_env
from deploy import port, redis_server, resources
from deploy.console import Console, error_in
from deploy.process import Process, State
from deploy.readiness import DeploymentReadiness
from deploy.scratch import scratch
from deploy.supervisor import Readiness, Supervisor

DEMO_MODEL = Path(__file__).parent / "demo" / "model"
REDIS_START_S = 20.0
CANCEL_AGAIN_S = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

C = TypeVar("C", WorkerConfig, RouterConfig)


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    directory: Path
    name: str
    """Its name in the API."""


def find_model(config: UpConfig, scratch: Path, console: Console) -> Model:
    """The checkpoint to serve, on this machine's disk. Raises ModelError.

    Without `--model` the demo model, or a random one written below `scratch`.
    """
    from common.model.hub import resolve
    from common.model.spec import load_spec

    if config.model is not None:
        model = Model(resolve(config.model, config.revision), config.model)
    elif (DEMO_MODEL / "config.json").is_file():
        console.note("No --model given: serving the demo model of this repository.")
        model = Model(DEMO_MODEL, "tandem-demo")
    else:
        console.note(
            "No --model given: serving a tiny model with RANDOM weights; its text means nothing."
        )
        directory = scratch / "model"
        directory.mkdir()
        random_model.write(directory)
        model = Model(directory, random_model.NAME)
    load_spec(model.directory)  # refuses here, once, what every worker would refuse
    return dataclasses.replace(model, name=config.served_model_name or model.name)


def derive(kind: type[C], config: UpConfig, **settings: Any) -> C:
    """The configuration of one role: what `config` says, but for `settings`."""
    names = {field.name for field in dataclasses.fields(kind)}
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name in names
    }
    return kind(**(values | settings))


class Deployment:
    """The processes of one `tandem up` and what they are started with."""

    def __init__(
        self,
        config: UpConfig,
        model: Model,
        redis: redis_server.RedisServer | None,
        http_port: int,
        console: Console,
    ) -> None:
        redis_url = config.redis if redis is None else redis.url
        assert redis_url is not None
        self.url = port.url_of(config.host, http_port, config.ssl_certfile is not None)
        router = derive(
            RouterConfig, config, model=str(model.directory), revision=None, redis=redis_url,
            port=http_port, served_model_name=model.name,
        )  # fmt: skip
        self.redis: Process | None = None
        if redis is not None:
            self.redis = Process("redis", redis.argv, to_env(router), console, chatty=True)
        self.router = Process("router", self._argv("router", router), to_env(router), console)

        names = [f"prefill-{i}" for i in range(config.prefill)]
        names += [f"decode-{i}" for i in range(config.decode)]
        life = secrets.token_hex(3)  # several deployments may share a Redis
        worker_ids = {name: f"{name}-{life}" for name in names}
        self.workers: list[Process] = []
        for name, share in zip(names, resources.plan(config, model.directory), strict=True):
            worker = derive(
                WorkerConfig, config, model=str(model.directory), revision=None, redis=redis_url,
                worker_id=worker_ids[name], device=share.device, kv_memory=share.kv_memory,
                threads=share.threads, pin_cores=",".join(map(str, share.cores)) or None,
            )  # fmt: skip
            argv = self._argv(name.partition("-")[0], worker)
            self.workers.append(Process(name, argv, to_env(worker), console))

        self.readiness = DeploymentReadiness(redis_url, config.namespace, self.url, worker_ids)
        own_redis = [] if self.redis is None else [self.redis]
        self.supervisor = Supervisor([[self.router], self.workers, own_redis], console)

    def _argv(self, role: str, config: WorkerConfig | RouterConfig) -> list[str]:
        return [sys.executable, "-m", "deploy.cli", role, *to_argv(config)]

    async def run(self, config: UpConfig, model: Model, console: Console) -> None:
        """Start everything, say that it is ready, keep it running until cancelled.

        Raises ConfigError if a process does not come up.
        """
        if self.redis is not None:
            await self.supervisor.start(self.redis, "starting")
            await self._come_up(console, self.readiness, REDIS_START_S)
        await self.supervisor.start(self.router, "starting")
        for worker in self.workers:
            await self.supervisor.start(worker, "loading")
        await self._come_up(console, self.readiness, config.start_timeout_s)
        console.ready(ready_message(config, model, self.url))
        await self.supervisor.keep(self.readiness)

    async def _come_up(self, console: Console, readiness: Readiness, timeout_s: float) -> None:
        failed = await self.supervisor.until_ready(readiness, timeout_s)
        if failed is None:
            return
        reason = error_in(failed.tail)
        if reason is not None:
            raise ConfigError(f"{failed.name}: {reason}")
        console.tail(failed.name, failed.tail)
        if failed.state is not State.EXITED:
            raise ConfigError(f"{failed.name} was not ready after {timeout_s:g} s")
        raise ConfigError(f"{failed.name} ended with code {failed.returncode} before it was ready")


def ready_message(config: UpConfig, model: Model, url: str) -> list[str]:
    ask = {"prompt": "A Python list is", "max_tokens": 64, "temperature": 0, "stream": True}
    body = json.dumps(ask)
    key = ' -H "Authorization: Bearer $TANDEM_API_KEY"' if config.api_key else ""
    workers = f"{config.prefill} prefill, {config.decode} decode"
    return [
        f"Serving {model.name} at {url} ({workers}). Try:",
        f"  curl -N {url}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'",
    ]


async def serve(config: UpConfig, model: Model, deployment: Deployment, console: Console) -> None:
    """Run the deployment until a signal asks for its end, or it does not come up.

    The first signal drains, the second ends everything at once. Raises ConfigError.
    """
    leave, hurry = asyncio.Event(), asyncio.Event()

    def asked() -> None:
        (hurry if leave.is_set() else leave).set()

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, asked)
    run = asyncio.create_task(deployment.run(config, model, console))
    try:
        await _first_of(run, leave)
    finally:
        leave.set()
        drain = asyncio.create_task(deployment.supervisor.drain(config.drain_s))
        try:
            await _first_of(drain, hurry)
        finally:
            await deployment.supervisor.kill()


async def _first_of(work: asyncio.Task[None], event: asyncio.Event) -> None:
    """Wait for the end of `work` or for `event`; cancels `work`, raises what it raised."""
    waiter = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({work, waiter}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()
        while not work.done():
            # Again and again: `asyncio.wait_for`, which the Redis client uses, may lose one.
            work.cancel()
            await asyncio.wait({work}, timeout=CANCEL_AGAIN_S)
    if not work.cancelled() and (error := work.exception()) is not None:
        raise error


def main(config: UpConfig) -> int:
    """Run until a signal ends it. Returns 0; raises ConfigError if it cannot run."""
    log.setup(config, "up", "up")
    for number in SIGNALS:  # until the event loop takes them over
        signal.signal(number, signal.default_int_handler)
    console = Console(config.log_format == "json")
    try:
        with port.reserved(config.host, config.port) as http_port, scratch() as directory:
            if config.redis is not None:
                redis_server.check(config.redis)
            model = find_model(config, directory, console)
            redis = None if config.redis is not None else redis_server.RedisServer(directory)
            deployment = Deployment(config, model, redis, http_port, console)
            asyncio.run(serve(config, model, deployment, console))
    except KeyboardInterrupt:
        return 0
    return 0
