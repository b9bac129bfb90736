"""The answer to one HTTP call, in chunks or whole: what the OpenAI dialects share.

`router.reply` hands every Delta to `take`, in order; then asks for its `chunk` (streaming) or at
the end for `whole`. The dialects are `router.completion_answer`, `router.chat_answer`
and `router.response_answer`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final
from uuid import uuid4

import msgspec

from common.errors import RequestError
from common.messages import TokenLogprob
from router import errors
from router.request import Delta, Request
from router.token_text import TokenText

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode
_MARK: Final = "\ue000text\ue001"
"""Stands for the text of a chunk; of private characters, so that no name or id is like it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the client wants to see beside the text."""

    include_usage: bool = False
    continuous_usage: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False
    """Tokens beside logprobs are shown as `token_id:5`."""
    reasoning: bool = True
    """Reasoning is shown, not only told apart from the answer."""
    prompt_logprobs: int | None = None
    prompt_text: str | None = None
    """The rendered conversation, where it is to be shown."""
    echo: str = ""
    """What a message of a chat begins with."""
    n: int = 1
    """Choices that are shown of each prompt; there may be more of which the best are."""
    logprobs: int | None = None
    """Most likely tokens per position; None: no logprobs at all."""


@dataclass(slots=True, eq=False)
class Tally:
    """What one choice has got so far."""

    request: Request
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    score: float = 0.0
    """Sum of the log-probabilities of its tokens."""
    num_chars: int = 0
    """Characters of the tokens whose logprobs were shown (`text_offset`)."""
    finish: str | None = None
    stop_reason: str | int | None = None
    chunks: int = 0
    frame: tuple[bytes, bytes] | None = None
    """What stands before and after the text in its chunks, where they differ in nothing else."""


def event(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(value) + b"\n\n"


class Answer:
    """One of the dialects; `object_*` and `prefix` are their names for things."""

    prefix: ClassVar[str]
    object_whole: ClassVar[str]
    object_chunk: ClassVar[str]

    def __init__(
        self, model: str, token_text: TokenText, requests: Sequence[Request], options: Options
    ) -> None:
        self._requests = requests
        self._options = options
        self._token_text = token_text
        self._tallies = [Tally(request) for request in requests for _ in request.choices]
        self._id = f"{self.prefix}-{uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    @property
    def num_choices(self) -> int:
        return len(self._tallies)

    def take(self, delta: Delta) -> None:
        """Add a delta to its choice."""
        tally = self._tallies[delta.choice]
        tally.text.append(delta.text)
        tally.tokens.extend(delta.tokens)
        if delta.logprobs:
            if self._options.logprobs is not None:
                tally.logprobs.extend(delta.logprobs)
            tally.score += sum(entry.logprob for entry in delta.logprobs)
        if delta.finish:
            assert tally.finish is None, f"choice {delta.choice} finished twice"
            tally.finish = delta.finish
            tally.stop_reason = delta.stop_reason

    def opening(self) -> bytes:
        """Events before the first delta."""
        return b""

    def chunk(self, delta: Delta) -> bytes:
        """The event of a delta that was just taken."""
        tally = self._tallies[delta.choice]
        if tally.frame is not None and not delta.finish:
            tally.chunks += 1
            return tally.frame[0] + _encode(delta.text) + tally.frame[1]
        value = self._envelope(self.object_chunk, [self._chunk_choice(delta, tally)])
        tally.chunks += 1
        if self._options.continuous_usage:
            prompt = len(tally.request.prompt)
            value["usage"] = self._counts(prompt, len(tally.tokens), tally.request.cached_tokens)
        elif self._options.include_usage:
            value["usage"] = None
        if tally.chunks == 1 and self._has_frames:
            tally.frame = self._frame(delta, tally)
        return event(value)

    @property
    def _has_frames(self) -> bool:
        """Chunks between the first and the last of a choice differ in their text alone."""
        options = self._options
        return options.logprobs is None and not (options.continuous_usage or options.token_ids)

    def _frame(self, delta: Delta, tally: Tally) -> tuple[bytes, bytes]:
        """What stands before and after the text in such a chunk."""
        marked = Delta(delta.choice, _MARK, (), (), "", None)
        value = self._envelope(self.object_chunk, [self._chunk_choice(marked, tally)])
        if self._options.include_usage:
            value["usage"] = None
        before, after = event(value).split(_encode(_MARK))
        return before, after

    def closing(self) -> bytes:
        """Events after the last delta: usage if it was asked for, and the end."""
        if not self._options.include_usage:
            return DONE
        return event({**self._envelope(self.object_chunk, []), "usage": self.usage()}) + DONE

    def failure(self, error: RequestError) -> bytes:
        """The end of a stream that cannot go on; no `[DONE]`: nobody takes it for a whole one."""
        return b"data: " + errors.body(error) + b"\n\n"

    def whole(self) -> bytes:
        """The answer of a call that is not streamed."""
        choices = [self._whole_choice(i, tally) for i, tally in enumerate(self._best())]
        value = {**self._envelope(self.object_whole, choices), "usage": self.usage()}
        return _encode(value | self._extra())

    def _best(self) -> list[Tally]:
        """The choices that are shown, of each prompt those of the highest log-probability per
        token."""
        shown: list[Tally] = []
        for request in self._requests:
            mine = [tally for tally in self._tallies if tally.request is request]
            if len(mine) > self._options.n:
                mine.sort(key=lambda tally: -tally.score / max(1, len(tally.tokens)))
            shown += mine[: self._options.n]
        return shown

    def _shown_token(self, token: int) -> str:
        if self._options.tokens_as_ids:
            return f"token_id:{token}"
        return self._token_text.text(token)

    def _prompt_logprobs(self, request: Request) -> list[dict[str, Any] | None]:
        """Per token of the prompt, as vLLM has it; nothing comes before the first one."""
        count = self._options.prompt_logprobs or 0
        rows: list[dict[str, Any] | None] = [None]
        for entry in request.prompt_logprobs:
            tokens = [
                (token, value, rank)
                for rank, (token, value) in enumerate(entry.top[:count], start=1)
            ]
            if all(token != entry.token for token, _, _ in tokens):
                tokens.append((entry.token, entry.logprob, entry.rank))
            rows.append(
                {
                    str(token): {
                        "logprob": value,
                        "rank": rank,
                        "decoded_token": self._token_text.text(token),
                    }
                    for token, value, rank in tokens
                }
            )
        return rows

    def usage(self) -> dict[str, Any]:
        return self._counts(
            sum(len(request.prompt) for request in self._requests),
            sum(len(tally.tokens) for tally in self._tallies),
            sum(request.cached_tokens for request in self._requests),
        )

    def _counts(self, num_prompt: int, num_outputs: int, num_cached: int) -> dict[str, Any]:
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_outputs,
            "total_tokens": num_prompt + num_outputs,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _extra(self) -> dict[str, Any]:
        """What a dialect adds at the top of a whole answer."""
        return {}

    def _chunk_choice(self, delta: Delta, tally: Tally) -> dict[str, Any]:
        raise NotImplementedError

    def _whole_choice(self, index: int, tally: Tally) -> dict[str, Any]:
        raise NotImplementedError
