"""Fixtures of the router tests: one Redis and one set of tokenizer files for all of them."""

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import pytest

from router.tokenizer import TextModel
from tests.redis_server import RedisServer
from tests.router.deployment import Deployment, deployment
from tests.router.text_files import write_text_files


class Deploy(Protocol):
    """`deployment` with Redis and tokenizer files filled in."""

    def __call__(self, **options: Any) -> AbstractAsyncContextManager[Deployment]: ...


@pytest.fixture(scope="session")
def router_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = RedisServer(tmp_path_factory.mktemp("r"))
    server.start()
    yield server.url
    server.close()


@pytest.fixture(scope="session")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_files(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def text_model(text_files: Path) -> Iterator[TextModel]:
    model = TextModel(text_files)
    yield model
    model.close()


@pytest.fixture
def deploy(router_redis: str, text_files: Path) -> Deploy:
    def make(**options: Any) -> AbstractAsyncContextManager[Deployment]:
        return deployment(router_redis, text_files, **options)

    return make
