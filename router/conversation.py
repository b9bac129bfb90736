"""What a conversation consists of: messages with their parts and calls, tools and their choice.

Fields of the bodies in `router.schemas`, which says how they are validated.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, Tag
from pydantic_core import PydanticCustomError

from router.fields import Free, Strict, at_most, check_free, one_of, text_only

MAX_PARTS: Final = 256
"""Content parts of one message."""
MAX_ALL_PARTS: Final = 4_096
"""Content parts and tool calls of one call."""
MAX_TOOL_CALLS: Final = 128
MAX_TOOLS: Final = 128


class TextPart(Strict):
    type: Literal["text", "input_text", "output_text"]
    text: str

    # What other servers say beside a text, and marks for the caches of others. Without effect.
    annotations: Free = None
    cache_control: Free = None
    citations: Free = None
    extras: Free = None
    id: Free = None
    index: Free = None
    logprobs: Free = None
    prompt_cache_breakpoint: Free = None
    provider_specific_fields: Free = None

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
    provider_specific_fields: Free = None


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: ToolFunction
    index: int | None = None
    """In the stream that the client collected it from; without effect."""
    cache_control: Free = None
    extra_content: Free = None
    provider_specific_fields: Free = None


class FunctionTool(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Annotated[dict[str, Any], BeforeValidator(check_free)] | None = None
    strict: bool | None = None
    """Accepted without effect: calls that are enforced follow the schema in any case."""
    defer_loading: Literal[False] | None = None
    cache_control: Free = Field(None, exclude=True)
    """No part of what the model is told of a tool."""

    @property
    def arguments_schema(self) -> dict[str, Any]:
        """Of the arguments."""
        return self.parameters or {"type": "object", "properties": {}}


class Tool(Strict):
    type: Literal["function"] = "function"
    function: FunctionTool
    defer_loading: Literal[False] | None = None
    cache_control: Free = Field(None, exclude=True)


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


ToolChoice = Annotated[
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
    cache_control: Free = None
    id: Free = None
    images: Free = None
    parsed: Free = None
    provider_specific_fields: Free = None
    reasoning_details: Free = None
    reasoning_items: Free = None
    thinking_blocks: Free = None
    type: Literal["text", "message"] | None = None
    audio: None = None
    function_call: None = None

    @property
    def text(self) -> str:
        """What was said, whatever it was made of."""
        if isinstance(self.content, list):
            return "\n".join(part.shown for part in self.content)
        return self.content or ""


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


Messages = Annotated[
    list[Message],
    Field(min_length=1, fail_fast=True),
    BeforeValidator(_check_total),
    at_most("messages"),  # the last one is the first to be asked
]
