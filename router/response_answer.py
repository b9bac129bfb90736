"""Answers of `/v1/responses`: the same tokens as a chat's, told as items and named events.

Made by `router.responses` through `router.intake`; what it shows of the text is decided by
`router.chat_answer`, in which form by `router.response_items`.
"""

import time
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from common.errors import RequestError
from router.answer import Options
from router.chat_answer import ChatAnswer, Manner
from router.request import Delta, Request
from router.response_items import Event, Items
from router.said import Piece
from router.token_text import TokenText

_encode = msgspec.json.Encoder().encode


class ResponseAnswer(ChatAnswer):
    """One choice. `echo`: what the response object repeats of its request."""

    prefix: ClassVar[str] = "resp"

    def __init__(
        self,
        model: str,
        token_text: TokenText,
        requests: Sequence[Request],
        options: Options,
        manner: Manner,
        echo: dict[str, Any],
    ) -> None:
        super().__init__(model, token_text, requests, options, manner)
        self._id = self._id.replace("-", "_", 1)
        self._echo = echo
        self._items = Items()
        self._events: list[Event] = []
        """Of the delta that was taken last."""
        self._logprobs_due: list[dict[str, Any]] = []
        """Of tokens whose text is held back."""
        self._reasoning_tokens = 0
        self._sequence = 0
        self._completed: int | None = None

    def take(self, delta: Delta) -> None:
        super().take(delta)
        pieces = self._fresh
        if self._manner.is_plain:
            pieces = [Piece("content", delta.text)] if delta.text else []
        if (shown := self._logprobs(delta.logprobs)) is not None:
            self._logprobs_due += shown["content"]
        self._events = [event for piece in pieces for event in self._tell(piece)]
        if self._items.reasons:
            self._reasoning_tokens += len(delta.tokens)
        if delta.finish:
            self._completed = int(time.time())
            if not self._items.output:
                self._events += self._items.say("", ())
            status = "incomplete" if delta.finish == "length" else "completed"
            self._events += self._items.close(status, self._logprobs_due)

    def _tell(self, piece: Piece) -> list[Event]:
        due, self._logprobs_due = self._logprobs_due, []
        match piece.kind:
            case "content":
                return self._items.say(piece.text, due)
            case "reasoning":
                return self._items.reason(piece.text)
            case "call":
                return self._items.call(self._call_ids[0][piece.call], piece.text)
            case "arguments":
                return self._items.argue(piece.text)

    def opening(self) -> bytes:
        return b"".join(
            self._event({"type": type, "response": self._response("in_progress")})
            for type in ("response.created", "response.in_progress")
        )

    def chunk(self, delta: Delta) -> bytes:
        return b"".join(map(self._event, self._events))

    def closing(self) -> bytes:
        status = self._status()
        return self._event({"type": f"response.{status}", "response": self._response(status)})

    def failure(self, error: RequestError) -> bytes:
        response = self._response("failed")
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        response["error"] = {"code": code, "message": error.message}
        return self._event({"type": "response.failed", "response": response})

    def whole(self) -> bytes:
        return _encode(self._response(self._status()))

    def _event(self, value: Event) -> bytes:
        value["sequence_number"] = self._sequence
        self._sequence += 1
        return b"event: %s\ndata: %s\n\n" % (value["type"].encode(), _encode(value))

    def _status(self) -> str:
        return "incomplete" if self._tallies[0].finish == "length" else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        is_over = status in ("completed", "incomplete")
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": self._completed if status == "completed" else None,
            "status": status,
            "model": self._model,
            "output": self._items.output,
            "error": None,
            "incomplete_details": reason,
            "usage": self._response_usage() if is_over else None,
            **self._echo,
        }

    def _response_usage(self) -> dict[str, Any]:
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }
