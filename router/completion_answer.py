"""Answers of `/v1/completions`: text, and logprobs as parallel lists. Made by `router.intake`."""

from collections.abc import Sequence
from typing import Any, ClassVar

from common.messages import TokenLogprob
from router.answer import Answer, Options, Tally
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
        self._echo = {id(r): text for r, text in zip(requests, echo, strict=False)}

    def _echoed(self, tally: Tally) -> str:
        return self._echo.get(id(tally.request), "")

    def _chunk_choice(self, delta: Delta, tally: Tally) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": delta.choice,
            "text": self._echoed(tally) + delta.text if tally.chunks == 0 else delta.text,
            "logprobs": self._logprobs(delta.logprobs, tally, with_prompt=tally.chunks == 0),
            "finish_reason": delta.finish or None,
            "stop_reason": delta.stop_reason,
        }
        if self._options.token_ids:
            choice["token_ids"] = delta.tokens
            choice["prompt_token_ids"] = tally.request.prompt if tally.chunks == 0 else None
        if self._options.prompt_logprobs is not None and tally.chunks == 0:
            choice["prompt_logprobs"] = self._prompt_logprobs(tally.request)
        return choice

    def _whole_choice(self, index: int, tally: Tally) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "text": self._echoed(tally) + "".join(tally.text),
            "logprobs": self._logprobs(tally.logprobs, tally, with_prompt=True),
            "finish_reason": tally.finish,
            "stop_reason": tally.stop_reason,
        }
        if self._options.token_ids:
            choice["token_ids"] = tally.tokens
            choice["prompt_token_ids"] = tally.request.prompt
        if self._options.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(tally.request)
        return choice

    def _logprobs(
        self, logprobs: Sequence[TokenLogprob], tally: Tally, with_prompt: bool
    ) -> dict[str, list[Any]] | None:
        """with_prompt: those of an echoed prompt come first."""
        if self._options.logprobs is None:
            return None
        echoes = with_prompt and bool(self._echo)
        if echoes:
            logprobs = [*tally.request.prompt_logprobs, *logprobs]
        tokens = [self._shown_token(entry.token) for entry in logprobs]
        first = [self._shown_token(tally.request.prompt[0])] if echoes else []
        tally.num_chars += sum(map(len, first))
        offsets = []
        for text in tokens:
            offsets.append(tally.num_chars)
            tally.num_chars += len(text)
        top: list[dict[str, float] | None] = [None] * len(first)
        for entry, text in zip(logprobs, tokens, strict=True):
            best = entry.top[: self._options.logprobs]
            likely = {self._shown_token(token): value for token, value in best}
            # The chosen token is always listed, also when it is not among the most likely.
            likely.setdefault(text, entry.logprob)
            top.append(likely)
        return {
            "tokens": first + tokens,
            "token_logprobs": [*(None for _ in first), *(entry.logprob for entry in logprobs)],
            "top_logprobs": top,
            "text_offset": [0] * len(first) + offsets,
        }
