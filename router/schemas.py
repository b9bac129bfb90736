"""The request bodies of the OpenAI API: which fields there are, their types and their ranges.

`parse` turns a decoded JSON body into one of them, or into a RequestError (400) that names the
field. Explicit nulls mean "not given". Called by `router.app`; read by `router.intake`.

A body of some megabytes may hold millions of wrong values, so validation ends at the first one:
every list and dict has a most length that is looked at first, every list fails fast, and unknown
keys are looked for before the values are.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, Tag
from pydantic_core import PydanticCustomError

from common.errors import RequestError
from router.caps import DEFAULT, Caps
from router.fields import (
    MAX_METADATA,
    SHOWN,
    Body,
    Free,
    Labelled,
    Strict,
    at_most,
    check_free,
    no_longer,
    no_more,
    one_of,
    refuse,
    text_only,
    validated,
)

MAX_PROMPTS: Final = 256
MAX_PROMPT_TOKENS: Final = 2**20
"""Token ids in one call; the context of the model decides below this."""
MAX_PARTS: Final = 256
"""Content parts of one message."""
MAX_ALL_PARTS: Final = 4_096
"""Content parts and tool calls of one call."""
MAX_TOOL_CALLS: Final = 128
MAX_TOOLS: Final = 128
MAX_COUNT: Final = 2**31 - 1
"""Of counts of tokens; the context of the model decides below this."""
_INT64: Final = 2**63


_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Tokens = Annotated[list[_Token], Field(min_length=1, fail_fast=True), at_most(MAX_PROMPT_TOKENS)]
_Stop = Annotated[str, Field(min_length=1), no_longer("stop_length")]
_Stops = Annotated[list[_Stop], Field(fail_fast=True), at_most("stop")]
_StopIds = Annotated[list[_Token], Field(fail_fast=True), at_most("stop")]
_Logprobs = Annotated[int, Field(ge=0), no_more("logprobs")]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Biases = Annotated[dict[str, _Bias], at_most("logit_bias")]


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted without effect: nothing is padded."""


class SamplingBody(Labelled):
    """What completions and chat completions share."""

    model: Annotated[str, Field(max_length=1_024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1), no_more("n")] | None = None
    max_tokens: int | None = Field(None, ge=0, le=MAX_COUNT)
    min_tokens: int | None = Field(None, ge=0, le=MAX_COUNT)
    stop: _Stop | _Stops | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_COUNT)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: _Biases | None = None
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    ignore_eos: bool | None = None
    stop_token_ids: _StopIds | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    prompt_logprobs: _Logprobs | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=MAX_COUNT)
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    response_format: Free = None
    structured_outputs: Free = None
    guided_choice: Free = None
    guided_grammar: Free = None
    guided_json: Free = None
    guided_regex: Free = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None

    # Known, but only in the values that ask for nothing: see `_NEUTRAL`.
    allowed_token_ids: Free = None
    bad_words: Free = None
    guided_decoding_backend: Free = None
    guided_whitespace_pattern: Free = None
    kv_transfer_params: Free = None
    length_penalty: Free = None
    logits_processors: Free = None
    spaces_between_special_tokens: Free = None
    use_beam_search: Free = None
    vllm_xargs: Free = None


class CompletionBody(SamplingBody):
    prompt: (
        str
        | _Tokens
        | Annotated[list[str], Field(min_length=1, fail_fast=True), at_most(MAX_PROMPTS)]
        | Annotated[list[_Tokens], Field(min_length=1, fail_fast=True), at_most(MAX_PROMPTS)]
    )
    echo: bool | None = None
    logprobs: _Logprobs | None = None
    best_of: Annotated[int, Field(ge=1), no_more("best_of")] | None = None
    prompt_embeds: Free = None
    suffix: Free = None


class TokenizeBody(Strict):
    """Of `/tokenize` with a text."""

    model: Annotated[str, Field(max_length=1_024)] | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Strict):
    model: Annotated[str, Field(max_length=1_024)] | None = None
    tokens: Annotated[list[_Token], Field(fail_fast=True), at_most(MAX_PROMPT_TOKENS)]


class TextPart(Strict):
    type: Literal["text", "input_text", "output_text"]
    text: str

    @property
    def shown(self) -> str:
        return self.text


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str

    @property
    def shown(self) -> str:
        return self.refusal


class ToolFunction(Strict):
    name: str
    arguments: str | None = None
    parsed_arguments: Free = None
    """What a client's library made of the arguments; without effect."""


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: ToolFunction
    index: int | None = None
    """In the stream that the client collected it from; without effect."""


class FunctionTool(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Annotated[dict[str, Any], BeforeValidator(check_free)] | None = None
    strict: bool | None = None

    @property
    def arguments_schema(self) -> dict[str, Any]:
        """Of the arguments."""
        return self.parameters or {"type": "object", "properties": {}}


class Tool(Strict):
    type: Literal["function"]
    function: FunctionTool


class _ToolName(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: _ToolName


class _ToolSet(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, fail_fast=True), at_most(MAX_TOOLS)]


class AllowedTools(Strict):
    """Some of the tools may be called, one of them must be (`required`)."""

    type: Literal["allowed_tools"]
    allowed_tools: _ToolSet


_ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("[mode]")]
    | Annotated[NamedTool, Tag("[function]")]
    | Annotated[AllowedTools, Tag("[allowed_tools]")],
    one_of("function", "allowed_tools", other="mode"),
]
_Part = Annotated[
    Annotated[
        Annotated[TextPart, Tag("[text]")] | Annotated[RefusalPart, Tag("[refusal]")],
        one_of("refusal", other="text"),
    ],
    BeforeValidator(text_only),
]
_Parts = Annotated[list[_Part], Field(fail_fast=True), at_most(MAX_PARTS)]
_ToolCalls = Annotated[list[ToolCall], Field(fail_fast=True), at_most(MAX_TOOL_CALLS)]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | _Parts | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: _ToolCalls | None = None
    tool_call_id: str | None = None

    # What answers carry, and what clients' libraries add to them, when they are sent back.
    # Without effect.
    annotations: Free = None
    parsed: Free = None
    provider_specific_fields: Free = None
    audio: None = None
    function_call: None = None


def _check_total(messages: object) -> object:
    """Each message may have many parts, but not all of them."""
    if isinstance(messages, list):
        total = 0
        for message in messages:
            if isinstance(message, dict):
                for name in ("content", "tool_calls"):
                    value = message.get(name)
                    total += len(value) if isinstance(value, list) else 0
        if total > MAX_ALL_PARTS:
            raise PydanticCustomError(
                "too_long", "should have at most {n} parts and tool calls", {"n": MAX_ALL_PARTS}
            )
    return messages


_Messages = Annotated[
    list[Message],
    Field(min_length=1, fail_fast=True),
    BeforeValidator(_check_total),
    at_most("messages"),  # the last one is the first to be asked
]


class ChatBody(SamplingBody):
    messages: _Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_COUNT)
    logprobs: bool | None = None
    top_logprobs: _Logprobs | None = None
    add_generation_prompt: bool | None = None
    audio: Free = None
    chat_template: Free = None
    chat_template_kwargs: Annotated[dict[str, Free], at_most(MAX_METADATA)] | None = None
    continue_final_message: bool | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True), at_most(MAX_TOOLS)] | None = None
    tool_choice: _ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    include_reasoning: bool | None = None
    documents: Free = None
    echo: Free = None
    function_call: Free = None
    functions: Free = None
    media_io_kwargs: Free = None
    mm_processor_kwargs: Free = None
    modalities: Free = None
    prediction: Free = None
    verbosity: Free = None
    web_search_options: Free = None

    @property
    def forced_tool(self) -> str | None:
        """The one tool that must be called."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def must_call(self) -> bool:
        """Some tool must be called, whichever."""
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice == "required"

    @property
    def offers_tools(self) -> bool:
        """The model may call tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def chosen_names(self) -> list[str]:
        """Tools that `tool_choice` names."""
        match self.tool_choice:
            case NamedTool(function=function):
                return [function.name]
            case AllowedTools(allowed_tools=allowed):
                return [tool.function.name for tool in allowed.tools]
        return []

    @property
    def callable_tools(self) -> list[Tool]:
        """Those that the model is told of: a choice of some hides the others."""
        tools = self.tools or []
        if not isinstance(self.tool_choice, AllowedTools):
            return tools
        return [tool for tool in tools if tool.function.name in self.chosen_names]


class TokenizeChatBody(ChatBody):
    """Of `/tokenize` with a conversation."""

    return_token_strs: bool | None = None


_NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "web_search_options": (),
}
"""Parameters that are not supported, with the values (besides null) that ask for nothing."""
_OF_COMPLETIONS: Final = {name: values for name, values in _NEUTRAL.items() if name != "echo"}


def parse(kind: type[Body], data: object, caps: Caps = DEFAULT) -> Body:
    """`data` as a body. Raises RequestError (400)."""
    body = validated(kind, data, caps)
    refuse(body, _OF_COMPLETIONS if isinstance(body, CompletionBody) else _NEUTRAL)
    if isinstance(body, SamplingBody) and body.stream_options is not None and not body.stream:
        message = "'stream_options' is only allowed with 'stream': true."
        raise RequestError(400, message, param="stream_options")
    if isinstance(body, ChatBody):
        _check_tools(body)
    return body


def _check_tools(body: ChatBody) -> None:
    names = [tool.function.name for tool in body.tools or ()]
    if len(set(names)) < len(names):
        raise RequestError(400, "Two tools have the same name.", param="tools")
    asks = body.tool_choice not in (None, "none")
    if asks and (body.tools is None or (not names and body.tool_choice != "auto")):
        raise RequestError(400, "'tool_choice' needs 'tools'.", param="tool_choice")
    for name in body.chosen_names:
        if name not in names:
            message = f"There is no tool '{name[:SHOWN]}' in 'tools'."
            raise RequestError(400, message, param="tool_choice")
    if body.continue_final_message and body.add_generation_prompt:
        message = "'continue_final_message' excludes 'add_generation_prompt'."
        raise RequestError(400, message, param="continue_final_message")
