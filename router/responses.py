"""`/v1/responses` in terms of chat completions: its input as messages, its answer from a chat's.

`respond` is called by the route in `router.app`. Stateless: every call brings its whole
conversation.
"""

from functools import partial
from typing import Any, Final

from common.errors import RequestError
from router.caps import Caps
from router.intake import Call, Intake
from router.response_answer import ResponseAnswer
from router.response_schemas import (
    SAME,
    CallItem,
    CallOutputItem,
    InputItem,
    MessageItem,
    NamedFunction,
    ReasoningItem,
    ResponseBody,
    parse_response,
)
from router.schemas import ChatBody, parse

_OURS: Final = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""Names of chat completions in errors -> the client's own."""


async def respond(intake: Intake, data: object, label: str, tenant: str, caps: Caps) -> Call:
    """Raises RequestError."""
    body = parse_response(data, caps)
    echo = _echo(body)
    try:
        chat = parse(ChatBody, chat_fields(body), caps)
        return await intake.chat(chat, label, tenant, partial(ResponseAnswer, echo=echo))
    except RequestError as error:
        if error.param is not None:
            head, dot, rest = error.param.partition(".")
            error.param = _OURS.get(head, head) + dot + rest
        raise


def chat_fields(body: ResponseBody) -> dict[str, Any]:
    """The body of a chat completion that asks for the same."""
    fields = {
        name: value for name in SAME if (value := getattr(body, name)) is not None
    }  # fmt: skip
    fields["messages"] = messages(body)
    fields["max_completion_tokens"] = body.max_output_tokens
    if body.shows_logprobs:
        fields["logprobs"] = True
        fields["top_logprobs"] = body.top_logprobs or 0
    if body.reasoning is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    if body.text is not None and body.text.format is not None:
        fields["response_format"] = _response_format(body.text.format)
    if body.tools:
        fields["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in body.tools
        ]
        fields["parallel_tool_calls"] = body.parallel_tool_calls
    choice: object = body.tool_choice
    if isinstance(body.tool_choice, NamedFunction):
        choice = {"type": "function", "function": {"name": body.tool_choice.name}}
    fields["tool_choice"] = choice
    return fields


def messages(body: ResponseBody) -> list[dict[str, Any]]:
    """The conversation. What the model said in one turn (reasoning, text, calls) is one message."""
    result: list[dict[str, Any]] = []
    if body.instructions is not None:
        result.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*result, {"role": "user", "content": body.input}]
    turn: dict[str, Any] | None = None
    for item in body.input:
        if isinstance(item, CallOutputItem) or (
            isinstance(item, MessageItem) and item.role != "assistant"
        ):
            turn = None
            result.append(_said_to_it(item))
            continue
        if turn is None or (isinstance(item, MessageItem) and "tool_calls" in turn):
            turn = {"role": "assistant", "content": None}
            result.append(turn)
        _add_to_turn(turn, item)
    return result


def _said_to_it(item: MessageItem | CallOutputItem) -> dict[str, Any]:
    if isinstance(item, CallOutputItem):
        return {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
    return {"role": item.role, "content": _text(item.content)}


def _add_to_turn(turn: dict[str, Any], item: InputItem) -> None:
    match item:
        case MessageItem():
            turn["content"] = (turn["content"] or "") + _text(item.content)
        case ReasoningItem() if item.content:
            turn["reasoning_content"] = turn.get("reasoning_content", "") + _text(item.content)
        case CallItem():
            call = {
                "id": item.call_id,
                "type": "function",
                "function": {"name": item.name, "arguments": item.arguments},
            }
            turn.setdefault("tool_calls", []).append(call)


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _response_format(format: object) -> object:
    """`text.format` has no inner object around the schema."""
    if isinstance(format, dict) and format.get("type") == "json_schema":
        inner = {name: value for name, value in format.items() if name != "type"}
        return {"type": "json_schema", "json_schema": inner}
    return format


def _echo(body: ResponseBody) -> dict[str, Any]:
    """What the response object repeats of its request."""
    given = body.model_dump(include={"tools", "tool_choice", "reasoning", "text"})
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": given["reasoning"] or {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": (given["text"] or {}).get("format") or {"type": "text"}},
        "tool_choice": given["tool_choice"] or "auto",
        "tools": given["tools"] or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
