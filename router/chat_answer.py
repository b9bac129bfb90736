"""Answers of `/v1/chat/completions`: messages, calls of tools, reasoning, and logprobs per token.

Made by `router.intake`.
"""

import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from common.messages import TokenLogprob
from router.answer import Answer, Options, Tally, event
from router.request import Delta, Request
from router.said import Format, Piece, join
from router.speech import Speech
from router.token_text import TokenText

_ID_CHARS: Final = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Manner:
    """How the text of a chat is read: see `router.speech.Speech`."""

    format: Format = "none"
    name: str = ""
    thinks: bool | None = None
    one_call: bool = False
    """Only the first call is shown (`parallel_tool_calls` false)."""

    @property
    def is_plain(self) -> bool:
        """All of the text is content."""
        return self.format == "none" and self.thinks is None


class ChatAnswer(Answer):
    prefix: ClassVar[str] = "chatcmpl"
    object_whole: ClassVar[str] = "chat.completion"
    object_chunk: ClassVar[str] = "chat.completion.chunk"

    def __init__(
        self,
        model: str,
        token_text: TokenText,
        requests: Sequence[Request],
        options: Options,
        manner: Manner = Manner(),
    ) -> None:
        super().__init__(model, token_text, requests, options)
        self._manner = manner
        self._speeches = [
            Speech(manner.format, manner.name, manner.thinks) for _ in range(self.num_choices)
        ]
        self._pieces: list[list[Piece]] = [[] for _ in range(self.num_choices)]
        self._fresh: list[Piece] = []
        """Of the delta that was taken last."""
        self._call_ids: list[list[str]] = [[] for _ in range(self.num_choices)]

    @property
    def _hides(self) -> bool:
        """Tokens could show the reasoning that is not to be shown."""
        return not self._options.reasoning and self._manner.thinks is not None

    @property
    def _has_frames(self) -> bool:
        return self._manner.is_plain and super()._has_frames

    def take(self, delta: Delta) -> None:
        super().take(delta)
        if self._manner.is_plain:
            return
        speech = self._speeches[delta.choice]
        self._fresh = speech.push(delta.text)
        if delta.finish:
            self._fresh += speech.flush()
        if not self._options.reasoning:
            self._fresh = [piece for piece in self._fresh if piece.kind != "reasoning"]
        num_calls = speech.num_calls
        if self._manner.one_call:
            self._fresh = [piece for piece in self._fresh if piece.call < 1]
            num_calls = min(num_calls, 1)
        self._pieces[delta.choice] += self._fresh
        ids = self._call_ids[delta.choice]
        while len(ids) < num_calls:
            ids.append(self._new_id())

    def opening(self) -> bytes:
        """The role of each choice, before its text."""
        events = []
        for i in range(self.num_choices):
            delta = {"role": "assistant", "content": self._options.echo}
            choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}
            value = self._envelope(self.object_chunk, [choice])
            if i == 0:
                value |= self._extra()
            if self._options.continuous_usage:
                value["usage"] = self._counts(len(self._requests[0].prompt), 0, 0)
            elif self._options.include_usage:
                value["usage"] = None
            events.append(event(value))
        return b"".join(events)

    def _extra(self) -> dict[str, Any]:
        """What is shown of the prompt: at the top of a whole answer, or of a first chunk."""
        extra: dict[str, Any] = {}
        if self._options.token_ids:
            extra["prompt_token_ids"] = self._requests[0].prompt
        if self._options.prompt_logprobs is not None:
            extra["prompt_logprobs"] = self._prompt_logprobs(self._requests[0])
        if self._options.prompt_text is not None:
            extra["prompt_text"] = self._options.prompt_text
        return extra

    def _chunk_choice(self, delta: Delta, tally: Tally) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": delta.choice,
            "delta": self._delta(delta),
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": self._finish(delta.choice, delta.finish or None),
            "stop_reason": delta.stop_reason,
        }
        if self._options.token_ids and not self._hides:
            choice["token_ids"] = delta.tokens
        return choice

    def _delta(self, delta: Delta) -> dict[str, Any]:
        """What a chunk adds to its message."""
        if self._manner.is_plain:
            return {"content": delta.text}
        said = join([piece for piece in self._fresh if piece.kind in ("content", "reasoning")])
        value: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        for piece in self._fresh:
            if piece.kind == "call":
                calls[piece.call] = {
                    "index": piece.call,
                    "id": self._call_ids[delta.choice][piece.call],
                    "type": "function",
                    "function": {"name": piece.text, "arguments": ""},
                }
            elif piece.kind == "arguments":
                call = calls.setdefault(piece.call, {"index": piece.call, "function": {}})
                function = call["function"]
                function["arguments"] = function.get("arguments", "") + piece.text
        if said.reasoning:
            value["reasoning_content"] = value["reasoning"] = said.reasoning
        if calls:
            value["tool_calls"] = list(calls.values())
        if said.content or not value:
            value["content"] = said.content
        return value

    def _whole_choice(self, index: int, tally: Tally) -> dict[str, Any]:
        echo = self._options.echo
        message: dict[str, Any] = {"role": "assistant", "content": echo + "".join(tally.text)}
        if not self._manner.is_plain:
            said = join(self._pieces[index])
            content = echo + said.content
            message["content"] = content or (None if said.names else "")
            if said.reasoning:
                message["reasoning_content"] = message["reasoning"] = said.reasoning
            if said.names:
                message["tool_calls"] = [
                    {
                        "id": id,
                        "type": "function",
                        "function": {"name": name, "arguments": arguments},
                    }
                    for id, name, arguments in zip(
                        self._call_ids[index], said.names, said.arguments, strict=True
                    )
                ]
        message["refusal"] = None
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(tally.logprobs),
            "finish_reason": self._finish(index, tally.finish),
            "stop_reason": tally.stop_reason,
        }
        if self._options.token_ids and not self._hides:
            choice["token_ids"] = tally.tokens
        return choice

    def _finish(self, index: int, finish: str | None) -> str | None:
        """An answer that calls tools ends with that; one that had to call a named one is an
        answer like any other, as in OpenAI's API."""
        calls = self._speeches[index].num_calls and self._manner.format != "named"
        return "tool_calls" if finish == "stop" and calls else finish

    def _new_id(self) -> str:
        if self._manner.format == "mistral":
            return "".join(secrets.choice(_ID_CHARS) for _ in range(9))  # all that it takes
        return f"call_{secrets.token_hex(12)}"

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._options.logprobs is None or self._hides:
            return None
        return {
            "content": [
                {
                    **self._token(entry.token, entry.logprob),
                    "top_logprobs": [self._token(token, value) for token, value in entry.top],
                }
                for entry in logprobs
            ]
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._shown_token(token),
            "logprob": logprob,
            "bytes": list(self._token_text.raw(token)),
        }
