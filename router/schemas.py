"""The request bodies of the OpenAI API: which fields there are, their types and their ranges.

`parse` turns a decoded JSON body into one of them, or into a RequestError (400) that names the
field. Explicit nulls mean "not given". Called by `router.app`; read by `router.intake`.

A body of some megabytes may hold millions of wrong values, so validation ends at the first one:
every list and dict has a most length that is looked at first, every list fails fast, and unknown
keys are looked for before the values are.
"""

from typing import Annotated, Final, Literal

from pydantic import Field

from common.errors import RequestError
from router.caps import DEFAULT, Caps
from router.conversation import MAX_TOOLS, AllowedTools, Messages, NamedTool, Tool, ToolChoice
from router.fields import (
    MAX_METADATA,
    SHOWN,
    Body,
    Free,
    Labelled,
    Strict,
    at_most,
    no_longer,
    no_more,
    refuse,
    validated,
)

MAX_PROMPTS: Final = 256
MAX_PROMPT_TOKENS: Final = 2**20
"""Token ids in one call; the context of the model decides below this."""
MAX_COUNT: Final = 2**31 - 1
"""Of counts of tokens; the context of the model decides below this."""
MAX_ALLOWED: Final = 2**18
"""Of `allowed_token_ids`: the largest vocabularies have about so many."""
MAX_BAD_WORDS: Final = 128
MAX_DOCUMENTS: Final = 128
_INT64: Final = 2**63


_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Tokens = Annotated[list[_Token], Field(min_length=1, fail_fast=True), at_most(MAX_PROMPT_TOKENS)]
_Stop = Annotated[str, Field(min_length=1), no_longer("stop_length")]
_Stops = Annotated[list[_Stop], Field(fail_fast=True), at_most("stop")]
_StopIds = Annotated[list[_Token], Field(fail_fast=True), at_most("stop")]
_Logprobs = Annotated[int, Field(ge=0), no_more("logprobs")]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Biases = Annotated[dict[str, _Bias], at_most("logit_bias")]
_Allowed = Annotated[list[_Token], Field(min_length=1, fail_fast=True), at_most(MAX_ALLOWED)]
_LogprobIds = Annotated[list[_Token], Field(fail_fast=True), at_most("logit_bias")]
_BadWords = Annotated[list[_Stop], Field(fail_fast=True), at_most(MAX_BAD_WORDS)]
_Document = Annotated[dict[str, str], at_most(MAX_METADATA)]


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
    temperature: float | None = Field(None, ge=0, le=2)
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
    logprob_token_ids: _LogprobIds | None = None
    """Shown beside each token's logprob instead of the most likely ones."""
    allowed_token_ids: _Allowed | None = None
    bad_words: _BadWords | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=MAX_COUNT)
    truncation_side: Literal["left", "right"] | None = None
    """Where `truncate_prompt_tokens` cuts; the end of the prompt is kept by default."""
    spaces_between_special_tokens: bool | None = None
    """Accepted without effect: the model's own tokenizer says how tokens are put together."""
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    response_format: Free = None
    structured_outputs: Free = None
    guided_choice: Free = None
    guided_grammar: Free = None
    guided_json: Free = None
    guided_regex: Free = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    # Known, but only in the values that ask for nothing: see `NEUTRAL`.
    early_stopping: Free = None
    ec_transfer_params: Free = None
    guided_decoding_backend: Free = None
    guided_whitespace_pattern: Free = None
    kv_transfer_params: Free = None
    length_penalty: Free = None
    logits_processors: Free = None
    mm_payload: Free = None
    repetition_detection: Free = None
    return_mm_kwargs: Free = None
    return_token_offsets: Free = None
    routed_experts_prompt_start: Free = None
    stream_interval: Free = None
    thinking_token_budget: Free = None
    use_beam_search: Free = None
    vllm_xargs: Free = None
    watermarking: Free = None


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


class ChatBody(SamplingBody):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_COUNT)
    logprobs: bool | None = None
    top_logprobs: _Logprobs | None = None
    add_generation_prompt: bool | None = None
    audio: Free = None
    chat_template: Free = None
    chat_template_kwargs: Annotated[dict[str, Free], at_most(MAX_METADATA)] | None = None
    continue_final_message: bool | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True), at_most(MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    include_reasoning: bool | None = None
    documents: Annotated[list[_Document], Field(fail_fast=True), at_most(MAX_DOCUMENTS)] | None = (
        None
    )
    """For the chat template."""
    echo: bool | None = None
    """The answer begins with the last message, if that is the assistant's."""
    return_prompt_text: bool | None = None
    best_of: Free = None
    function_call: Free = None
    functions: Free = None
    media_io_kwargs: Free = None
    mm_processor_kwargs: Free = None
    modalities: Free = None
    moderation: Free = None
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


NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "early_stopping": (False,),
    "ec_transfer_params": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "media_io_kwargs": ({},),
    "mm_payload": ("tensors", "none"),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_embeds": (),
    "repetition_detection": ({},),
    "return_mm_kwargs": (False, True),
    "return_token_offsets": (False,),
    "routed_experts_prompt_start": (0,),
    "stream_interval": (1,),
    "suffix": ("",),
    "thinking_token_budget": (-1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    "web_search_options": (),
}
"""Parameters that are not supported, with the values (besides null) that ask for nothing."""
_OF_COMPLETIONS: Final = {name: values for name, values in NEUTRAL.items() if name != "best_of"}


def parse(kind: type[Body], data: object, caps: Caps = DEFAULT) -> Body:
    """`data` as a body. Raises RequestError (400)."""
    body = validated(kind, data, caps)
    refuse(body, _OF_COMPLETIONS if isinstance(body, CompletionBody) else NEUTRAL)
    if isinstance(body, SamplingBody):
        _check_companions(body)
    if isinstance(body, CompletionBody) and body.prompt == "":
        raise RequestError(400, "The prompt is empty.", param="prompt", code="invalid_value")
    if isinstance(body, ChatBody):
        _check_tools(body)
    return body


def _check_companions(body: SamplingBody) -> None:
    """Refuse what has no effect without another field."""
    options = body.stream_options
    if options is not None and options.model_fields_set and not body.stream:
        message = "'stream_options' is only allowed with 'stream': true."
        raise RequestError(400, message, param="stream_options")
    if body.logprob_token_ids and not _shows_logprobs(body):
        message = "'logprob_token_ids' needs 'logprobs'."
        raise RequestError(400, message, param="logprob_token_ids")


def _shows_logprobs(body: SamplingBody) -> bool:
    match body:
        case CompletionBody():
            return body.logprobs is not None
        case ChatBody():
            return bool(body.logprobs)
    return False


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
