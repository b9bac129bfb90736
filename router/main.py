"""One router process: `main` is called by `tandem router` and `tandem up`.

start: tokenizer, Redis, port -> serve -> SIGTERM: refuse new, finish what is live -> exit 0
"""

import asyncio
import contextlib
import gc
import logging
import secrets
import signal
import socket
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import uvloop

from common import log as log_lines
from common.config import RouterConfig
from common.curve import CurveKeys
from common.errors import ConfigError
from common.identity import text_id
from common.link import RouterLink
from common.redis_client import check_redis
from router.app import Parts, create_app
from router.caps import Caps
from router.cors import Cors
from router.directory import Directory
from router.dispatch import Patience
from router.explain import Explainer
from router.grammars import Grammars
from router.inflight import Inflight
from router.intake import Intake
from router.keys import Keys
from router.membership import Membership, content_ids
from router.metrics import RouterMetrics
from router.said import FORMATS, Format
from router.server import Server, Tls, http_config, listen
from router.service import Service
from router.shared_keys import SharedKeys
from router.slo import STEP_S, Slo, parse
from router.tokenizer import TextModel, locate
from router.waiting import Bounds

log = logging.getLogger(__name__)

GARBAGE: Final = 20_000
"""Objects that come without going before the collector looks for circles among them."""
Follow = Callable[[], Coroutine[Any, Any, None]]
"""Runs until it is cancelled."""


def main(config: RouterConfig) -> int:
    """Runs until SIGTERM or SIGINT; returns the exit code. Raises ConfigError, in one line."""
    name = f"router-{secrets.token_hex(4)}"
    log_lines.setup(config, "router", name)
    if config.model is None:
        raise ConfigError("--model is missing")
    if config.redis is None:
        raise ConfigError("--redis is missing")
    directory = locate(config.model, config.revision)
    text_model = TextModel(directory, config.chat_template)
    listener = listen(config.host, config.port)
    with contextlib.closing(text_model), listener:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, name, config.redis, directory, text_model, listener))
    return 0


async def _serve(
    config: RouterConfig,
    name: str,
    redis_url: str,
    directory: Path,
    text_model: TextModel,
    listener: socket.socket,
) -> None:
    caps, cors, tls = Caps.of(config), Cors.of(config), Tls.of(config)
    slo = parse(config.slo_ttft, config.slo_itl)
    await check_redis(redis_url)
    assert config.model is not None
    model = config.served_model_name or config.model
    metrics = RouterMetrics()
    explainer = Explainer(metrics, _explain_log(config))
    link = RouterLink(name, config, CurveKeys.load(config))
    service = Service(
        # The workers' identity: --chat-template is this router's own affair.
        membership=Membership(
            text_id(directory, None), await asyncio.to_thread(content_ids, directory)
        ),
        directory=Directory(redis_url, config.namespace),
        link=link,
        metrics=metrics,
        patience=Patience(max_resumes=config.max_resumes),
        explainer=explainer,
        share=partial(Inflight, redis_url, config.namespace, name),
        step_s=_step_s(config, slo),
        slo=slo,
        bounds=Bounds(
            count=config.max_waiting,
            tokens=config.max_waiting_tokens,
            num_bytes=config.max_waiting_bytes,
        ),
        max_model_len=config.max_model_len,
        hang_s=config.hang_s,
    )
    path = Path(config.api_keys) if config.api_keys else None
    keys = Keys(config.api_key, path, are_shared=config.api_keys_in_redis)
    grammars = Grammars(directory)
    parts = Parts(
        service=service,
        intake=Intake(text_model, model, service, grammars, _tool_format(config)),
        metrics=metrics,
        model=model,
        caps=caps,
        keys=keys,
        cors=cors,
    )
    server = Server(http_config(create_app(parts), caps, tls, config.keep_alive_s))
    _ease_collection()
    follow: list[Follow] = [service.run]
    if config.api_keys_in_redis:
        follow.append(SharedKeys(redis_url, config.namespace, keys).run)
    try:
        await _run(service, follow, server, listener, config.drain_s)
    finally:
        explainer.close()
        await grammars.close()
        await link.close()


def _ease_collection() -> None:
    """What is there now stays: the collector need not look through it again and again, which was
    a fifteenth of all that a router computes."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE)


def _step_s(config: RouterConfig, slo: Slo) -> float | None:
    """How long a decode step may become where a prompt is computed beside it."""
    if config.local_prefill == "fallback":
        return None
    return STEP_S if slo.itl_s is None else slo.itl_s


def _explain_log(config: RouterConfig) -> Path | None:
    """Raises ConfigError if it cannot be written."""
    if config.explain_log is None:
        return None
    path = Path(config.explain_log)
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"--explain-log {path} cannot be written: {error.strerror}") from error
    return path


def _tool_format(config: RouterConfig) -> Format | None:
    return next((name for name in FORMATS if name == config.tool_call_parser), None)


async def _run(
    service: Service,
    follow: Sequence[Follow],
    server: Server,
    listener: socket.socket,
    drain_s: float,
) -> None:
    """Serves until a signal; then finishes what is live, for at most `drain_s`. `follow`: what runs
    all the time; if one of them ends by an error, that is raised."""
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[None] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, None)
    engine = asyncio.create_task(_all(follow))
    http = asyncio.create_task(server.serve(sockets=[listener]))
    stop = asyncio.create_task(signals.get())
    host, port = listener.getsockname()[:2]
    scheme = "https" if server.config.is_ssl else "http"
    log.info("listening on %s://%s:%d", scheme, f"[{host}]" if ":" in host else host, port)
    try:
        await asyncio.wait((engine, http, stop), return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            await _drain(service, signals, drain_s)
        server.should_exit = True
        await http
        if engine.done():
            engine.result()  # a bug: let it be seen
    finally:
        for task in (engine, http, stop):
            task.cancel()
        await asyncio.gather(engine, http, stop, return_exceptions=True)


async def _all(follow: Sequence[Follow]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for run in follow:
            tasks.create_task(run())


async def _drain(service: Service, signals: "asyncio.Queue[None]", drain_s: float) -> None:
    """New requests are refused; live ones end, at the latest with an error. A second signal
    cuts it short."""
    service.draining = True
    log.info("leaving; %d requests are live", service.num_live)
    idle = asyncio.create_task(service.idle())
    hurry = asyncio.create_task(signals.get())
    await asyncio.wait((idle, hurry), timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
    idle.cancel()
    hurry.cancel()
    service.shut_down()
