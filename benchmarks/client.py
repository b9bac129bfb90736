"""One streamed request to an OpenAI-compatible server, with the times of its tokens.

Times are taken when bytes arrive, before they are parsed. A chunk counts as tokens if it carries
a choice, also when its text is empty (a server may hold text back that it already generated).
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

_decode = msgspec.json.Decoder().decode


@dataclass(slots=True)
class Record:
    """What happened to one request. Times are seconds on the monotonic clock of this process."""

    scheduled: float
    sent: float = 0.0
    chunks: list[float] = field(default_factory=list)
    """Arrival of each chunk that carried tokens."""
    ended: float = 0.0
    input_len: int = 0
    output_len: int = 0
    """Generated tokens as the server counts them; chunks if it does not say."""
    cached_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    status: int = 0
    error: str = ""
    """Empty: completed. A rejection (429, 503) is an error with that status."""

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def rejected(self) -> bool:
        return self.status in (429, 503)

    @property
    def ttft_s(self) -> float:
        return self.chunks[0] - self.sent

    @property
    def e2e_s(self) -> float:
        return self.ended - self.sent

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per output token after the first; None with fewer than two tokens."""
        if self.output_len < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.output_len - 1)

    @property
    def itl_s(self) -> list[float]:
        """Gaps between chunks."""
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how requests are sent."""

    url: str
    """Full URL of the completions endpoint."""
    model: str | None
    headers: dict[str, str]
    extra: dict[str, Any]
    """Fields added to every body."""
    timeout_s: float


async def send(
    session: aiohttp.ClientSession, target: Target, tokens: list[int], output_len: int, due: float
) -> Record:
    """Send one request now and read its stream to the end. Never raises for a failed request."""
    body: dict[str, Any] = {
        "prompt": tokens,
        "max_tokens": output_len,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "ignore_eos": True,
        **target.extra,
    }
    if target.model is not None:
        body["model"] = target.model
    payload = msgspec.json.encode(body)
    record = Record(scheduled=due, input_len=len(tokens), sent=time.perf_counter())
    try:
        async with asyncio.timeout(target.timeout_s):
            async with session.post(target.url, data=payload, headers=target.headers) as response:
                record.status = response.status
                if response.status != 200:
                    text = await response.text()
                    record.error = f"HTTP {response.status}: {text[:200]}"
                else:
                    await _read_stream(response, record)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        record.error = f"{type(error).__name__}: {error}"
    record.ended = record.chunks[-1] if record.ok and record.chunks else time.perf_counter()
    return record


async def _read_stream(response: aiohttp.ClientResponse, record: Record) -> None:
    buffer = b""
    finished = False
    counted = False
    async for data in response.content.iter_any():
        now = time.perf_counter()
        buffer += data
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            event_data = line[5:].strip()
            if event_data == b"[DONE]":
                finished = True
                continue
            event = _decode(event_data)
            if "error" in event:
                record.error = f"stream error: {event['error']}"
                continue
            if event.get("choices"):
                record.chunks.append(now)
                for choice in event["choices"]:
                    record.token_ids.extend(choice.get("token_ids") or ())
            usage = event.get("usage")
            if usage:
                record.output_len = usage.get("completion_tokens") or 0
                counted = True
                details = usage.get("prompt_tokens_details") or {}
                record.cached_tokens = details.get("cached_tokens") or 0
    if not counted:
        record.output_len = len(record.chunks)
    if not record.error and not finished:
        record.error = "the stream ended without [DONE]"
    if not record.error and not record.chunks:
        record.error = "the stream carried no token"
