"""Answers of `/v1/chat/completions`: messages, and logprobs per token. Made by `router.intake`."""

from collections.abc import Sequence
from typing import Any, ClassVar

from common.messages import TokenLogprob
from router.answer import Answer, Tally, event
from router.request import Delta


class ChatAnswer(Answer):
    prefix: ClassVar[str] = "chatcmpl"
    object_whole: ClassVar[str] = "chat.completion"
    object_chunk: ClassVar[str] = "chat.completion.chunk"

    def opening(self) -> bytes:
        """The role of each choice, before its text."""
        events = []
        for i in range(self.num_choices):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}
            value = self._envelope(self.object_chunk, [choice])
            if self._options.token_ids and i == 0:
                value["prompt_token_ids"] = self._requests[0].prompt
            if self._options.continuous_usage:
                value["usage"] = self._counts(len(self._requests[0].prompt), 0, 0)
            elif self._options.include_usage:
                value["usage"] = None
            events.append(event(value))
        return b"".join(events)

    def _extra(self) -> dict[str, Any]:
        if not self._options.token_ids:
            return {}
        return {"prompt_token_ids": self._requests[0].prompt}

    def _chunk_choice(self, delta: Delta, tally: Tally) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": delta.choice,
            "delta": {"content": delta.text},
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": delta.finish or None,
            "stop_reason": delta.stop_reason,
        }
        if self._options.token_ids:
            choice["token_ids"] = delta.tokens
        return choice

    def _whole_choice(self, index: int, tally: Tally) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(tally.text), "refusal": None}
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(tally.logprobs),
            "finish_reason": tally.finish,
            "stop_reason": tally.stop_reason,
        }
        if self._options.token_ids:
            choice["token_ids"] = tally.tokens
        return choice

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._options.logprobs is None:
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
            "token": self._token_text.text(token),
            "logprob": logprob,
            "bytes": list(self._token_text.raw(token)),
        }
