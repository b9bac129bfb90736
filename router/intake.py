"""From a request body to requests for the service: names, prompts, limits, sampling parameters.

`Intake.completion` and `Intake.chat` are called by the routes of `router.app`; what a client asks
for and cannot have is a RequestError here, before anything was sent to a worker.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from common.errors import RequestError
from common.sampling import SamplingParams
from router.answer import Answer, Options
from router.backlog import Backlog
from router.chat_answer import ChatAnswer, Manner
from router.completion_answer import CompletionAnswer
from router.constraints import constraint_of
from router.fleet import Limits
from router.grammars import Grammars
from router.prompts import Prompt, chat_prompt, completion_prompts, too_long
from router.request import Choice, Request, TextRule
from router.said import MARKERS, THINK, Format, detect, may_think
from router.sampling import reseeded, sampling_params
from router.schemas import ChatBody, CompletionBody, SamplingBody
from router.service import Service
from router.text_api import TextApi
from router.token_text import TokenText
from router.tokenizer import TextModel

DEFAULT_MAX_TOKENS: Final = 16
"""Of completions, as OpenAI has it; a chat may use the rest of the context."""
MAX_CHOICES: Final = 1_024
"""Prompts times `n` of one call."""


Dialect = Callable[[str, TokenText, Sequence[Request], Options, Manner], ChatAnswer]
"""How a chat is told to its client."""


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP call, checked and tokenised, ready to be served."""

    requests: list[Request]
    events: Backlog
    """What happens to all of them."""
    answer: Answer
    stream: bool
    tenant: str
    """Whose usage it is; empty: of no tenant."""


class Intake:
    def __init__(
        self,
        text_model: TextModel,
        model: str,
        service: Service,
        grammars: Grammars,
        tool_format: Format | None = None,
    ) -> None:
        """tool_format: how the model writes calls of tools; None: as its chat template shows."""
        self.text = TextApi(text_model, self._check_model)
        self._grammars = grammars
        self._tool_format = tool_format
        ids = (text_model.backend.token_to_id(marker) for marker in MARKERS)
        self._visible = frozenset(id for id in ids if id is not None)
        self._text_model = text_model
        self._token_text = TokenText(text_model)
        self._model = model
        self._service = service

    async def completion(self, body: CompletionBody, label: str, tenant: str = "") -> Call:
        """Raises RequestError."""
        received = time.monotonic()
        self._check_model(body.model)
        _check_best_of(body)
        limits = await self._service.limits()
        prompts = await completion_prompts(body, self._text_model, limits)
        longest = max(len(prompt.tokens) for prompt in prompts)
        max_tokens = _room(limits, longest, body.max_tokens, DEFAULT_MAX_TOKENS, "prompt")
        if max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
            message = "'max_tokens' must be at least 1, but with 'echo' or 'prompt_logprobs'."
            raise RequestError(400, message, param="max_tokens", code="invalid_value")
        params = await sampling_params(body, limits, max_tokens, body.logprobs, self._text_model)
        scored = body.prompt_logprobs
        if body.echo and body.logprobs is not None:
            scored = max(body.logprobs, scored or 0)
        best_of = body.best_of or body.n or 1
        params = msgspec.structs.replace(
            params,
            max_tokens=max(1, max_tokens),
            grammar=await self._grammar(body, limits),
            prompt_logprobs=scored,
            logprobs=0 if body.logprobs is None and best_of > (body.n or 1) else params.logprobs,
        )
        rule = _rule(body)
        requests, events = self._requests(body, prompts, params, label, best_of, rule, tenant)
        for request in requests:
            request.received = received
            request.silent = max_tokens == 0
        echo = [self._text(prompt) for prompt in prompts] if body.echo else []
        options = _options(body, body.logprobs)
        answer = CompletionAnswer(self._model, self._token_text, requests, options, echo)
        return Call(requests, events, answer, bool(body.stream), tenant)

    async def chat(
        self, body: ChatBody, label: str, tenant: str = "", dialect: Dialect = ChatAnswer
    ) -> Call:
        """Raises RequestError."""
        received = time.monotonic()
        self._check_model(body.model)
        if body.top_logprobs and not body.logprobs:
            message = "'top_logprobs' needs 'logprobs': true."
            raise RequestError(400, message, param="top_logprobs")
        limits = await self._service.limits()
        prompt = await chat_prompt(body, self._text_model, limits)
        wanted = body.max_completion_tokens
        wanted = body.max_tokens if wanted is None else wanted
        max_tokens = _room(limits, len(prompt.tokens), wanted, None, "messages")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if max_tokens == 0:
            message = "'max_tokens' must be at least 1."
            raise RequestError(400, message, param="max_tokens", code="invalid_value")
        grammar = await self._grammar(body, limits)
        params = msgspec.structs.replace(
            await sampling_params(body, limits, max_tokens, logprobs, self._text_model),
            grammar=grammar,
            prompt_logprobs=body.prompt_logprobs,
        )
        manner = self._manner(body, prompt, constrained=bool(grammar))
        rule = _rule(body, frozenset() if manner.is_plain else self._visible)
        requests, events = self._requests(body, [prompt], params, label, body.n or 1, rule, tenant)
        for request in requests:
            request.received = received
        options = replace(
            _options(body, logprobs),
            prompt_text=prompt.text if body.return_prompt_text else None,
            echo=_echoed(body),
        )
        answer = dialect(self._model, self._token_text, requests, options, manner)
        return Call(requests, events, answer, bool(body.stream), tenant)

    async def _grammar(self, body: SamplingBody, limits: Limits) -> str:
        """What the answer must match; empty: anything. Raises RequestError (400)."""
        constraint = constraint_of(body)
        if constraint is None:
            return ""
        return await self._grammars.compile(constraint, limits.vocab_size, limits.eos_token_ids)

    def _manner(self, body: ChatBody, prompt: Prompt, constrained: bool) -> Manner:
        """How the text of a chat is to be read."""
        template = self._text_model.chat_template
        assert template is not None
        thinks: bool | None = None
        if not constrained and may_think(template.source):
            thinks = (prompt.text or "").rstrip().endswith(THINK[0])
        if body.forced_tool is not None:
            return Manner("named", body.forced_tool, thinks)
        if body.must_call:
            return Manner("list", "", thinks)
        if not body.offers_tools or constrained:
            return Manner("none", "", thinks)
        format = self._tool_format or detect(template.source)
        return Manner(format, "", thinks, one_call=body.parallel_tool_calls is False)

    def _text(self, prompt: Prompt) -> str:
        return prompt.text if prompt.text is not None else self._text_model.decode(prompt.tokens)

    def _check_model(self, name: str | None) -> None:
        if name and name != self._model:
            raise unknown_model(name)

    def _requests(
        self,
        body: SamplingBody,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        label: str,
        n: int,
        rule: TextRule,
        tenant: str,
    ) -> tuple[list[Request], Backlog]:
        if n * len(prompts) > MAX_CHOICES:
            message = f"{len(prompts)} prompts with n = {n} are more than {MAX_CHOICES} choices."
            raise RequestError(400, message, param="n")
        events = Backlog(n * len(prompts))
        requests = [
            Request(
                id=secrets.randbits(63),
                label=label,
                prompt=prompt.tokens,
                params=params if body.seed is not None else reseeded(params),
                rule=rule,
                salt=_salt(body.cache_salt or "", tenant),
                tenant=tenant,
                events=events,
                first_choice=i * n,
                choices=[Choice(number, rule, self._text_model) for number in range(n)],
            )
            for i, prompt in enumerate(prompts)
        ]
        return requests, events


def unknown_model(name: str) -> RequestError:
    return RequestError(
        404, f"The model '{name}' does not exist.", param="model", code="model_not_found"
    )


def _salt(given: str, tenant: str) -> str:
    """Separates what is cached for tenants, whatever they send. Raises RequestError (400)."""
    if "\0" in given:
        raise RequestError(400, "'cache_salt' holds a NUL character.", param="cache_salt")
    return f"{tenant}\0{given}" if tenant else given


def _rule(body: SamplingBody, visible: frozenset[int] = frozenset()) -> TextRule:
    stop = body.stop or ()
    return TextRule(
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        visible=visible,
    )


def _check_best_of(body: CompletionBody) -> None:
    if body.best_of is None:
        return
    if body.best_of < (body.n or 1):
        raise RequestError(400, "'best_of' must be at least 'n'.", param="best_of")
    if body.stream and body.best_of > (body.n or 1):
        message = "'best_of' above 'n' cannot be streamed."
        raise RequestError(400, message, param="best_of")


def _room(limits: Limits, num_prompt: int, wanted: int | None, default: int | None,
          param: str) -> int:  # fmt: skip
    """Output tokens that are allowed: `wanted`, else `default` or all that is left."""
    left = limits.context - num_prompt
    if (left < 1 and wanted != 0) or left < 0 or (wanted is not None and wanted > left):
        asked = f"{num_prompt + (wanted or 1)}"
        detail = f"{num_prompt} in the {param}, {wanted or 1} in the completion"
        raise too_long(limits, asked, param, detail)
    if wanted is not None:
        return wanted
    return left if default is None else min(default, left)


def _echoed(body: ChatBody) -> str:
    """The assistant's last message, if the answer is to begin with it."""
    last = body.messages[-1]
    return last.text if body.echo and last.role == "assistant" else ""


def _options(body: SamplingBody, logprobs: int | None) -> Options:
    stream = body.stream_options
    return Options(
        include_usage=bool(stream and stream.include_usage),
        continuous_usage=bool(stream and stream.continuous_usage_stats),
        token_ids=bool(body.return_token_ids),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        reasoning=not isinstance(body, ChatBody) or body.include_reasoning is not False,
        prompt_logprobs=body.prompt_logprobs,
        n=body.n or 1,
        # All that were asked for by id are shown.
        logprobs=logprobs if logprobs is None else max(logprobs, len(body.logprob_token_ids or ())),
    )
