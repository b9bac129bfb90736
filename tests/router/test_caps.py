"""Every cap is a flag; one above it is refused with the OpenAI body, and nothing else notices."""

import json
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from common.config import RouterConfig
from common.errors import ConfigError
from router.caps import DEFAULT, Caps
from tests.router.conftest import Deploy

TEXT: dict[str, Any] = {"prompt": "x", "max_tokens": 1}
CAPS = Caps(
    n=3, best_of=4, logprobs=2, stop=2, stop_length=5, logit_bias=3, messages=2, body_bytes=4_000,
    header_bytes=3_000, json_depth=6, json_values=400,
)  # fmt: skip
Make = Callable[[int], dict[str, Any]]


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    return value


def deep(depth: int) -> dict[str, Any]:
    """A body of that depth; the text makes it one with many brackets."""
    return {**TEXT, "user": "[" * 300, "metadata": {"a": nested(depth - 2)}}


CASES: list[tuple[str, int, str | None, Make]] = [
    ("completions", CAPS.n, "n", lambda n: {**TEXT, "n": n}),
    ("completions", CAPS.best_of, "best_of", lambda n: {**TEXT, "best_of": n}),
    ("completions", CAPS.logprobs, "logprobs", lambda n: {**TEXT, "logprobs": n}),
    ("completions", CAPS.logprobs, "prompt_logprobs", lambda n: {**TEXT, "prompt_logprobs": n}),
    ("completions", CAPS.stop, "stop", lambda n: {**TEXT, "stop": ["x"] * n}),
    ("completions", CAPS.stop, "stop_token_ids", lambda n: {**TEXT, "stop_token_ids": [1] * n}),
    ("completions", CAPS.stop_length, "stop", lambda n: {**TEXT, "stop": "x" * n}),
    ("completions", CAPS.stop_length, "stop", lambda n: {**TEXT, "stop": ["x" * n]}),
    (
        "completions", CAPS.logit_bias, "logit_bias",
        lambda n: {**TEXT, "logit_bias": {str(i): 0 for i in range(n)}},
    ),
    ("completions", CAPS.json_depth, None, deep),
    (
        "completions", CAPS.json_values, None,
        lambda n: {**TEXT, "metadata": {"a": [0] * (n - 4)}},  # each comma and bracket counts
    ),
    (
        "chat/completions", CAPS.messages, "messages",
        lambda n: {"messages": [{"role": "user", "content": "x"}] * n, "max_tokens": 1},
    ),
    (
        "chat/completions", CAPS.logprobs, "top_logprobs",
        lambda n: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1,
                   "logprobs": True, "top_logprobs": n},
    ),
    (
        "responses", CAPS.messages, "input",
        lambda n: {"input": [{"role": "user", "content": "x"}] * n, "max_output_tokens": 1},
    ),
    (
        "completions", CAPS.body_bytes, None,
        lambda n: {**TEXT, "user": "x" * (n - len(json.dumps({**TEXT, "user": ""})))},
    ),
]  # fmt: skip


async def test_one_above_a_cap_is_refused(deploy: Deploy) -> None:
    async with deploy(prefill=0, caps=CAPS) as served:
        (worker,) = served.decodes
        for path, cap, param, make in CASES:
            fine, more = (json.dumps(make(n)).encode() for n in (cap, cap + 1))
            response = await served.http.post(f"/v1/{path}", content=fine)
            assert response.status_code == 200, (path, param, response.text)
            worker.seen.clear()
            started = time.monotonic()
            response = await served.http.post(f"/v1/{path}", content=more)
            took_s = time.monotonic() - started
            assert response.status_code in (400, 413), (path, param, response.text)
            error = response.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["param"] == param and str(cap) in error["message"], error
            assert took_s < 1.0, "it is 50 ms on a machine that does nothing else"
            assert worker.seen == []
        head = {"x-large": "a" * CAPS.header_bytes}
        assert (await served.http.get("/ping", headers=head)).status_code == 431
        head = {"x-large": "a" * (CAPS.header_bytes - 500)}
        assert (await served.http.get("/ping", headers=head)).status_code == 200


@pytest.mark.parametrize("name", Caps.__slots__)
def test_every_cap_is_a_flag(name: str) -> None:
    flag = f"max_{name}"
    seven: dict[str, Any] = {flag: 7}
    below: dict[str, Any] = {flag: -1}
    assert Caps.of(RouterConfig()) == DEFAULT
    config = RouterConfig(**seven)
    assert getattr(Caps.of(config), name) == 7
    with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')} must be at least"):
        RouterConfig(**below)


async def test_too_many_token_ids_are_not_even_decoded(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    caps = Caps()
    async with deploy(prefill=0, caps=caps) as served:
        (worker,) = served.decodes
        ids = b"5," * caps.json_values + b"5"
        decoded: list[int] = []
        decode: Any = msgspec.json.decode

        def noted(body: bytes, **options: Any) -> Any:
            decoded.append(len(body))
            return decode(body, **options)

        monkeypatch.setattr(msgspec.json, "decode", noted)
        for body in (b'{"prompt": [%b]}', b'{"prompt": [[%b]]}', b'{"nothing": [%b]}'):
            content = body % ids
            response = await served.http.post("/v1/completions", content=content)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (400, "too_many_values")
        assert not [size for size in decoded if size > len(ids)] and worker.seen == []
