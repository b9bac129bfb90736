"""The body of `/v1/responses`: its fields, and the items that its input consists of.

Read by `router.responses`, which turns it into a conversation. Nothing is kept between calls:
what refers to an earlier response is refused by name, and `store` has no effect.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, Tag

from common.errors import RequestError
from router.caps import DEFAULT, Caps
from router.conversation import MAX_PARTS, MAX_TOOLS, FunctionTool
from router.fields import (
    Free,
    Labelled,
    Strict,
    at_most,
    no_more,
    one_of,
    refuse,
    text_only,
    validated,
)
from router.schemas import MAX_COUNT, ChatBody


class _Part(Strict):
    type: Literal["input_text", "output_text", "text", "reasoning_text"]
    text: str
    annotations: Free = None
    logprobs: Free = None
    prompt_cache_breakpoint: Free = None
    """Accepted without effect, as in chats."""


_Parts = Annotated[
    list[Annotated[_Part, BeforeValidator(text_only)]], Field(fail_fast=True), at_most(MAX_PARTS)
]


class _Item(Strict):
    id: str | None = None
    status: str | None = None


class MessageItem(_Item):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | _Parts
    phase: str | None = None


class CallItem(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    caller: Free = None
    namespace: None = None


class CallOutputItem(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: str | _Parts
    name: str | None = None
    caller: Free = None
    namespace: None = None


class ReasoningItem(_Item):
    type: Literal["reasoning"]
    summary: Free = None
    content: _Parts | None = None
    encrypted_content: str | None = None


InputItem = Annotated[
    Annotated[MessageItem, Tag("[message]")]
    | Annotated[CallItem, Tag("[function_call]")]
    | Annotated[CallOutputItem, Tag("[function_call_output]")]
    | Annotated[ReasoningItem, Tag("[reasoning]")],
    one_of("function_call", "function_call_output", "reasoning", other="message"),
]


class ResponseTool(FunctionTool):
    type: Literal["function"]
    allowed_callers: Annotated[list[Literal["direct"]], at_most(1)] | None = Field(
        None, exclude=True
    )
    output_schema: Free = Field(None, exclude=True)
    """Of what the client answers to a call. Accepted without effect."""


class NamedFunction(Strict):
    type: Literal["function"]
    name: str


class TextOptions(Strict):
    format: Free = None
    verbosity: str | None = None


class ReasoningOptions(Strict):
    effort: Annotated[str, Field(max_length=64)] | None = None
    summary: str | None = None
    """Accepted without effect: reasoning is shown whole."""
    generate_summary: str | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class ResponseStreamOptions(Strict):
    include_obfuscation: bool | None = None
    """Accepted without effect: nothing is padded."""


class ResponseBody(Labelled):
    """Fields without a comment mean what they mean in chat completions."""

    input: (
        str
        | Annotated[
            list[InputItem], Field(min_length=1, fail_fast=True), at_most("messages")
        ]
    )  # fmt: skip
    instructions: str | None = None
    model: Annotated[str, Field(max_length=1_024)] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_COUNT)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[int, Field(ge=0), no_more("logprobs")] | None = None
    include: Annotated[list[str], at_most(16)] | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: Annotated[list[ResponseTool], Field(fail_fast=True), at_most(MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None

    # vLLM's.
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Free = None
    seed: int | None = None
    stop: Free = None
    stop_token_ids: Free = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    chat_template_kwargs: Free = None
    allowed_token_ids: Free = None
    bad_words: Free = None
    structured_outputs: Free = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    include_reasoning: bool | None = None

    # Accepted without effect.
    max_tool_calls: int | None = Field(None, ge=1, le=MAX_COUNT)
    """Of tools that the server runs itself: there are none."""

    # Known, but only in the values that ask for nothing: see `NEUTRAL`.
    background: Free = None
    context_management: Free = None
    conversation: Free = None
    moderation: Free = None
    previous_response_id: Free = None
    prompt: Free = None
    truncation: Free = None

    @property
    def shows_logprobs(self) -> bool:
        return self.top_logprobs is not None or LOGPROBS in (self.include or ())


LOGPROBS: Final = "message.output_text.logprobs"
_INCLUDABLE: Final = (LOGPROBS, "reasoning.encrypted_content")
"""Encrypted reasoning is for servers that hide it; here it has no effect."""
NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "truncation": ("disabled",),
}
"""Parameters that are not supported, with the values (besides null) that ask for nothing."""
_TRANSLATED: Final = frozenset(
    {"stream_options", "tools", "tool_choice", "parallel_tool_calls", "top_logprobs"}
)
SAME: Final = frozenset(ResponseBody.model_fields.keys() & ChatBody.model_fields) - _TRANSLATED
"""Fields that go into the chat request as they are."""


def parse_response(data: object, caps: Caps = DEFAULT) -> ResponseBody:
    """Raises RequestError (400)."""
    _refuse_foreign(data, caps)
    body = validated(ResponseBody, data, caps)
    refuse(body, NEUTRAL)
    for name in body.include or ():
        if name not in _INCLUDABLE:
            raise _unsupported("include", name)
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        raise _unsupported("text.verbosity", body.text.verbosity)
    return body


def _refuse_foreign(data: object, caps: Caps) -> None:
    """Tools that the server would run, and items that refer to what it would have kept."""
    if not isinstance(data, dict):
        return
    for name, known in (("tools", _TOOLS), ("input", _ITEMS)):
        entries = data.get(name)
        for entry in entries[: caps.messages] if isinstance(entries, list) else ():
            if isinstance(entry, dict) and isinstance(kind := entry.get("type"), str):
                if kind not in known:
                    raise _unsupported(name, kind)


_TOOLS: Final = ("function",)
_ITEMS: Final = ("message", "function_call", "function_call_output", "reasoning")


def _unsupported(param: str, value: Any) -> RequestError:
    message = f"'{str(value)[:64]}' is not supported in '{param}'."
    return RequestError(400, message, param=param, code="unsupported_parameter")
