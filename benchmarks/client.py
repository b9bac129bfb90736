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
from tokenizers import Tokenizer


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None

    @property
    def only_role(self) -> bool:
        """Says who speaks, and nothing else: it comes before any token."""
        return self.role is not None and not self.content and not self.reasoning_content


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Event(msgspec.Struct):
    """What the client reads of an event of the stream; the rest is skipped."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(slots=True)
class Record:
    """What happened to one request. Times are seconds on the monotonic clock of this process."""

    due: float
    """When the load says that it leaves; a conversation's turn never before the answer to the
    one before it, a closed loop's request when its turn comes."""
    released: float = 0.0
    """When the client was free to send it: later than due if `max_concurrency` held it back."""
    sent: float = 0.0
    chunks: list[float] = field(default_factory=list)
    """Arrival of each chunk that carried tokens."""
    ended: float = 0.0
    input_len: int = 0
    """Prompt tokens as the server counts them; those that were sent if it does not say."""
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
    def held_s(self) -> float:
        """How long the limit of concurrency held it back."""
        return self.released - self.due

    @property
    def lag_s(self) -> float:
        """How late this client was: its own fault."""
        return self.sent - self.released

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
    tokenizer: Tokenizer | None = None
    """Prompts are sent as the text of their tokens; None: as token ids."""
    chat: bool = False
    """The endpoint takes messages: a prompt is one message of the user."""

    def body(self, tokens: list[int], output_len: int) -> bytes:
        """A greedy, streamed request of exact length (with text as exact as its tokens survive
        being read again)."""
        prompt: str | list[int] = tokens
        if self.tokenizer is not None:
            prompt = self.tokenizer.decode(tokens)
        fields: dict[str, Any] = {
            **(
                {"messages": [{"role": "user", "content": prompt}]}
                if self.chat
                else {"prompt": prompt}
            ),
            "max_tokens": output_len,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "ignore_eos": True,
            **self.extra,
        }
        if self.model is not None:
            fields["model"] = self.model
        return msgspec.json.encode(fields)


def connect() -> aiohttp.ClientSession:
    """Connections without limit, kept for less time than servers keep them (5 s is common), so
    that none is closed in the moment in which it is used."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


async def send(
    session: aiohttp.ClientSession, target: Target, body: bytes, record: Record
) -> Record:
    """Send one request now and read its stream to the end, all noted in `record`, which is
    returned. Never raises for a failed request."""
    record.sent = time.perf_counter()
    try:
        async with asyncio.timeout(target.timeout_s):
            async with session.post(target.url, data=body, headers=target.headers) as response:
                record.status = response.status
                if response.status != 200:
                    text = (await response.read()).decode(errors="replace")
                    record.error = f"HTTP {response.status}: {text[:200]}"
                else:
                    await _read_stream(response, record)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        record.error = f"{type(error).__name__}: {error}"
    except msgspec.MsgspecError as error:
        record.error = f"malformed event: {error}"
    record.ended = record.chunks[-1] if record.ok else time.perf_counter()
    return record


def _only_role(choices: list[_Choice]) -> bool:
    return all(c.delta is not None and c.delta.only_role and not c.token_ids for c in choices)


async def _read_stream(response: aiohttp.ClientResponse, record: Record) -> None:
    buffer = b""
    finished = False
    counted: int | None = None
    ended_empty = False
    async for data in response.content.iter_any():
        now = time.perf_counter()
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            text = line[5:].strip()
            if text == b"[DONE]":
                finished = True
                continue
            event = _decode(text)
            if (problem := bytes(event.error)) not in (b"", b"null"):
                record.error = f"stream error: {problem.decode(errors='replace')}"
                continue
            if event.choices and not _only_role(event.choices):
                record.chunks.append(now)
                for choice in event.choices:
                    record.token_ids.extend(choice.token_ids or ())
                last = event.choices[0]
                text_of = last.text or (last.delta and last.delta.content)
                ended_empty = last.finish_reason is not None and not text_of
            if event.usage is not None:
                counted = event.usage.completion_tokens
                record.input_len = event.usage.prompt_tokens or record.input_len
                details = event.usage.prompt_tokens_details
                record.cached_tokens = (details and details.cached_tokens) or 0
    # Some servers say why they end in a chunk of its own, which is no token.
    if counted is not None and ended_empty and 0 < counted < len(record.chunks):
        record.chunks.pop()
    record.output_len = len(record.chunks) if counted is None else counted
    if not record.error and not finished:
        record.error = "the stream ended without [DONE]"
    if not record.error and not record.chunks:
        record.error = "the stream carried no token"
