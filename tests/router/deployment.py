"""A router with stub workers: real HTTP, real links, a real Redis, all in one event loop."""

import asyncio
import contextlib
import itertools
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai

from common.config import TimerConfig
from common.identity import text_id
from common.link import RouterLink
from router.app import Parts, create_app
from router.caps import Caps
from router.cors import Cors
from router.directory import Directory
from router.dispatch import BOUNDS, NO_LIMITS, Patience
from router.explain import Explainer
from router.grammars import Grammars
from router.inflight import Inflight
from router.intake import Intake
from router.keys import Keys
from router.membership import Membership
from router.metrics import RouterMetrics
from router.server import Server, Tls, http_config, listen
from router.service import Service
from router.slo import Slo
from router.tokenizer import TextModel
from router.waiting import Bounds
from tests.router.stub_worker import Handoffs, StubWorker

MODEL = "stub-model"
NO_CORS = Cors()
CAPS = Caps(body_bytes=1 << 20)
PATIENCE = Patience(grace_s=0.3, resume_s=3.0)
TIMERS = TimerConfig(heartbeat_s=0.2)
_namespaces = itertools.count()


@dataclass(eq=False)
class Deployment:
    url: str
    http: httpx.AsyncClient
    openai: openai.AsyncOpenAI
    service: Service
    text_model: TextModel
    metrics: RouterMetrics
    prefills: list[StubWorker]
    decodes: list[StubWorker]
    redis_url: str
    namespace: str
    text_id: str
    handoffs: Handoffs
    keys: Keys

    @property
    def workers(self) -> list[StubWorker]:
        return [*self.prefills, *self.decodes]

    def value(self, name: str, **labels: str) -> float:
        """A metric, 0 if it was never touched."""
        return self.metrics.registry.get_sample_value(f"tandem_router_{name}", labels) or 0.0

    async def add(self, role: str, id: str, **changes: Any) -> StubWorker:
        """One more worker, connected."""
        worker = await self.start(role, id, **changes)
        await until(lambda: id in self.service.fleet)
        return worker

    async def start(self, role: str, id: str, **changes: Any) -> StubWorker:
        """One more worker; `changes` to its WorkerInfo."""
        worker = StubWorker(
            id,
            role,
            self.redis_url,
            self.namespace,
            text_id=self.text_id,
            handoffs=self.handoffs,
            timers=TIMERS,
        )
        worker.info = msgspec.structs.replace(worker.info, **changes)
        (self.prefills if role == "prefill" else self.decodes).append(worker)
        await worker.start()
        return worker


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Returns when the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.002)


def free_listener() -> socket.socket:
    return listen("127.0.0.1", 0)


@contextlib.asynccontextmanager
async def deployment(
    redis_url: str,
    text_files: Path,
    *,
    prefill: int = 1,
    decode: int = 1,
    patience: Patience = PATIENCE,
    api_key: str | None = None,
    api_keys: Path | None = None,
    shared_keys: bool = False,
    cors: Cors = NO_CORS,
    tls: Tls | None = None,
    max_model_len: int = 1024,
    num_blocks: int = 4096,
    caps: Caps = CAPS,
    hang_s: float = 30.0,
    content_ids: frozenset[str] = frozenset(),
    step_s: float | None = None,
    explain_log: Path | None = None,
    namespace: str = "",
    name: str = "router-test",
    slo: Slo = NO_LIMITS,
    bounds: Bounds = BOUNDS,
) -> AsyncIterator[Deployment]:
    namespace = namespace or f"test-{next(_namespaces)}"
    identity = text_id(text_files, None)
    text_model = TextModel(text_files)
    metrics = RouterMetrics()
    link = RouterLink(name, TIMERS)
    service = Service(
        membership=Membership(identity, content_ids),
        directory=Directory(redis_url, namespace),
        link=link,
        metrics=metrics,
        patience=patience,
        explainer=Explainer(metrics, explain_log),
        share=partial(Inflight, redis_url, namespace, name),
        step_s=step_s,
        slo=slo,
        bounds=bounds,
        hang_s=hang_s,
    )
    grammars = Grammars(text_files)
    keys = Keys(api_key, api_keys, are_shared=shared_keys)
    parts = Parts(
        service=service,
        intake=Intake(text_model, MODEL, service, grammars),
        metrics=metrics,
        model=MODEL,
        keys=keys,
        cors=cors,
        caps=caps,
    )
    handoffs = Handoffs()
    workers = {
        role: [
            StubWorker(
                f"{role}-{i}",
                role,
                redis_url,
                namespace,
                text_id=identity,
                handoffs=handoffs,
                timers=TIMERS,
                max_model_len=max_model_len,
                num_blocks=num_blocks,
            )
            for i in range(count)
        ]
        for role, count in (("prefill", prefill), ("decode", decode))
    }
    listener = free_listener()
    url = f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
    server = Server(http_config(create_app(parts), caps, tls))
    engine = asyncio.create_task(service.run())
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    headers = {"content-type": "application/json"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    verify = ssl.create_default_context(cafile=tls.certificate) if tls else True
    async with (
        httpx.AsyncClient(base_url=url, timeout=30, headers=headers, verify=verify) as http,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0) as sdk,
    ):
        try:
            for worker in (*workers["prefill"], *workers["decode"]):
                await worker.start()
            started = list(workers["prefill"]) + list(workers["decode"])
            await until(lambda: all(worker.info.id in service.fleet for worker in started))
            yield Deployment(
                url,
                http,
                sdk,
                service,
                text_model,
                metrics,
                workers["prefill"],
                workers["decode"],
                redis_url,
                namespace,
                identity,
                handoffs,
                keys,
            )
        finally:
            assert not engine.done(), engine
            for worker in (*workers["prefill"], *workers["decode"]):
                await worker.kill()
            server.should_exit = True
            await serving
            engine.cancel()
            await asyncio.gather(engine, return_exceptions=True)
            await grammars.close()
            await link.close()
            text_model.close()
            listener.close()
