"""Answers of `/v1/completions`: text, and logprobs as parallel lists. Made by `router.intake`."""

from collections.abc import Sequence
from typing import Any, ClassVar

from common.messages import TokenLogprob
from router.answer import Answer, Options, Tally, event
from router.request import Delta, Request
from router.token_text import TokenText


class CompletionAnswer(Answer):
    prefix: ClassVar[str] = "cmpl"
    object_whole: ClassVar[str] = "text_completion"
    object_chunk: ClassVar[str] = "text_completion"

    def __init__(
        self,
        model: str,
        token_text: TokenText,
        requests: Sequence[Request],
        options: Options,
        echo: Sequence[str] = (),
    ) -> None:
        """`echo`: text of each prompt, put before each of its choices."""
        super().__init__(model, token_text, requests, options)
        self._echo = [text for text in echo for _ in requests[0].choices]

    def opening(self) -> bytes:
        return b"".join(
            event(
                self._envelope(
                    self.object_chunk,
                    [{"index": i, "text": text, "logprobs": None, "finish_reason": None}],
                )
            )
            for i, text in enumerate(self._echo)
        )

    def _chunk_choice(self, delta: Delta, tally: Tally) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": delta.choice,
            "text": delta.text,
            "logprobs": self._logprobs(delta.logprobs, tally),
            "finish_reason": delta.finish or None,
            "stop_reason": delta.stop_reason,
        }
        if self._options.token_ids:
            choice["token_ids"] = delta.tokens
            choice["prompt_token_ids"] = tally.request.prompt if tally.chunks == 0 else None
        return choice

    def _whole_choice(self, index: int, tally: Tally) -> dict[str, Any]:
        echo = self._echo[index] if self._echo else ""
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + "".join(tally.text),
            "logprobs": self._logprobs(tally.logprobs, tally),
            "finish_reason": tally.finish,
            "stop_reason": tally.stop_reason,
        }
        if self._options.token_ids:
            choice["token_ids"] = tally.tokens
            choice["prompt_token_ids"] = tally.request.prompt
        return choice

    def _logprobs(
        self, logprobs: Sequence[TokenLogprob], tally: Tally
    ) -> dict[str, list[Any]] | None:
        if self._options.logprobs is None:
            return None
        tokens = [self._token_text.text(entry.token) for entry in logprobs]
        offsets = []
        for text in tokens:
            offsets.append(tally.num_chars)
            tally.num_chars += len(text)
        top = []
        for entry, text in zip(logprobs, tokens, strict=True):
            likely = {self._token_text.text(token): value for token, value in entry.top}
            # The chosen token is always listed, also when it is not among the most likely.
            likely.setdefault(text, entry.logprob)
            top.append(likely)
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": top,
            "text_offset": offsets,
        }
