"""The request bodies of the OpenAI API: which fields there are, their types and their ranges.

`parse` turns a decoded JSON body into one of them, or into a RequestError (400) that names the
field. Explicit nulls mean "not given". Called by `router.app`; read by `router.intake`.
"""

from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import RequestError

MAX_N: Final = 128
MAX_PROMPTS: Final = 256
MAX_STOPS: Final = 16
MAX_STOP_LENGTH: Final = 1_024
MAX_LOGPROBS: Final = 20
MAX_LOGIT_BIAS: Final = 1_024
MAX_MESSAGES: Final = 4_096
_INT64: Final = 2**63

_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_Tokens = Annotated[list[_Token], Field(min_length=1, fail_fast=True)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class _Strict(BaseModel):
    """No conversions ("16" is not 16), no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted without effect: nothing is padded."""


class SamplingBody(_Strict):
    """What completions and chat completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: Annotated[dict[str, _Bias], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[_Token], Field(max_length=MAX_STOPS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None

    # Accepted without effect.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None

    # Known, but only in the values that ask for nothing: see `_NEUTRAL`.
    allowed_token_ids: Any = None
    bad_words: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    length_penalty: Any = None
    priority: Any = None
    prompt_logprobs: Any = None
    response_format: Any = None
    return_tokens_as_token_ids: Any = None
    spaces_between_special_tokens: Any = None
    structured_outputs: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None


class CompletionBody(SamplingBody):
    prompt: (
        str
        | _Tokens
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[_Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Any = None
    suffix: Any = None


class TextPart(_Strict):
    type: Literal["text", "input_text", "output_text"]
    text: str


class ToolFunction(_Strict):
    name: str
    arguments: str


class ToolCall(_Strict):
    id: str
    type: Literal["function"] = "function"
    function: ToolFunction


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class ChatBody(SamplingBody):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    audio: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    continue_final_message: Any = None
    documents: Any = None
    echo: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None


_NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1.0,),
    "modalities": (["text"],),
    "prediction": (),
    "priority": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters that are not supported, with the values (besides null) that ask for nothing."""

_Body = TypeVar("_Body", bound=SamplingBody)


def parse(kind: type[_Body], data: object) -> _Body:
    """`data` as a body. Raises RequestError (400)."""
    if not isinstance(data, dict):
        raise RequestError(400, "The request body must be a JSON object.")
    try:
        body = kind.model_validate(data)
    except ValidationError as error:
        raise _explain(error) from error
    for name in body.model_fields_set & _NEUTRAL.keys():
        value = getattr(body, name)
        if isinstance(body, CompletionBody) and name == "echo":
            continue
        if name == "best_of" and value == (body.n or 1):
            continue
        if value is not None and value not in _NEUTRAL[name]:
            raise RequestError(
                400,
                f"The parameter '{name}' is not supported with this value.",
                param=name,
                code="unsupported_parameter",
            )
    if body.stream_options is not None and not body.stream:
        message = "'stream_options' is only allowed with 'stream': true."
        raise RequestError(400, message, param="stream_options")
    return body


def _explain(error: ValidationError) -> RequestError:
    """The first problem, in OpenAI's words."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = problems[0]
    name = str(first["loc"][0]) if first["loc"] else None
    path = ".".join(str(part) for part in first["loc"])
    match first["type"]:
        case "extra_forbidden":
            return RequestError(
                400, f"Unknown parameter: '{path}'.", param=path, code="unknown_parameter"
            )
        case "missing":
            return RequestError(
                400,
                f"Missing required parameter: '{path}'.",
                param=path,
                code="missing_required_parameter",
            )
    # Of a union each member complains; together they say what would be right.
    same = [p for p in problems if p["loc"] and p["loc"][0] == name]
    wanted = dict.fromkeys(p["msg"].removeprefix("Input ") for p in same[:8])
    return RequestError(
        400,
        f"Invalid value for '{name}': input {', or '.join(wanted)}.",
        param=name,
        code="invalid_value" if "type" not in first["type"] else "invalid_type",
    )
