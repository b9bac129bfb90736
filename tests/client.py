"""A small HTTP client for the system tests: requests in token ids, answers in token ids."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson


@dataclass
class Answer:
    """What one request returned; one entry per choice in `tokens`, `text` and `finish`."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    status: int = 0
    chunks: int = 0
    """SSE chunks that carried a choice."""
    done: bool = False
    """The stream ended with `[DONE]` (streaming only)."""

    @property
    def ids(self) -> list[int]:
        """Token ids of the only choice."""
        (tokens,) = self.tokens.values()
        return tokens

    @property
    def cached_tokens(self) -> int:
        return int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    def take(self, choice: dict[str, Any]) -> None:
        index = int(choice["index"])
        self.tokens.setdefault(index, []).extend(choice.get("token_ids") or [])
        self.text[index] = self.text.get(index, "") + (choice.get("text") or "")
        if choice.get("finish_reason"):
            assert index not in self.finish, "a choice finished twice"
            self.finish[index] = choice["finish_reason"]


def body(prompt: Sequence[int] | str, **params: Any) -> dict[str, Any]:
    """A completion request that is greedy, of exact length and answers token ids."""
    request: dict[str, Any] = {
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request.update(params)
    return request


def http(url: str, connections: int = 600) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(base_url=url, timeout=180, limits=limits)


async def complete(client: httpx.AsyncClient, prompt: Sequence[int] | str, **params: Any) -> Answer:
    """One completion without streaming."""
    response = await client.post("/v1/completions", json=body(prompt, **params))
    data = orjson.loads(response.content)
    answer = Answer(status=response.status_code)
    if response.status_code != 200:
        answer.error = data["error"]
        return answer
    for choice in data["choices"]:
        answer.take(choice)
    answer.usage = data["usage"]
    return answer


async def stream(
    client: httpx.AsyncClient,
    prompt: Sequence[int] | str,
    *,
    stop_after: int | None = None,
    started: asyncio.Event | None = None,
    **params: Any,
) -> Answer:
    """One streamed completion; closes the connection after `stop_after` chunks."""
    request = body(prompt, stream=True, stream_options={"include_usage": True}, **params)
    answer = Answer()
    async with client.stream("POST", "/v1/completions", json=request) as response:
        answer.status = response.status_code
        if response.status_code != 200:
            answer.error = orjson.loads(await response.aread())["error"]
            return answer
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            data = line[len("data: ") :]
            if data == "[DONE]":
                answer.done = True
                continue
            event = orjson.loads(data)
            if "error" in event:
                answer.error = event["error"]
                continue
            if event.get("usage"):
                answer.usage = event["usage"]
            for choice in event["choices"]:
                answer.take(choice)
                answer.chunks += 1
            if started is not None and answer.chunks:
                started.set()
            if stop_after is not None and answer.chunks >= stop_after:
                return answer
    return answer


async def ledger(client: httpx.AsyncClient) -> dict[str, Any]:
    response = await client.get("/debug/ledger")
    response.raise_for_status()
    result: dict[str, Any] = orjson.loads(response.content)
    return result
