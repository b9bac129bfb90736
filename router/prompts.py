"""Prompts as token ids: from strings, from token ids, from chat messages. Called by `intake`."""

import json
from dataclasses import dataclass
from typing import Any, Final

from common.errors import RequestError
from router.conversation import Message
from router.fleet import Limits
from router.nesting import is_small
from router.schemas import ChatBody, CompletionBody, SamplingBody
from router.tokenizer import TextModel

_END: Final = "\ue000end\ue001"
"""Stands behind a message that is to be continued while a template renders it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    tokens: list[int]
    text: str | None
    """As the client wrote it; None if it sent token ids."""


def too_long(limits: Limits, asked: str, param: str, detail: str = "") -> RequestError:
    """400 in the words that clients look for."""
    in_detail = f" ({detail})" if detail else ""
    return RequestError(
        400,
        f"This model's maximum context length is {limits.context} tokens. However, you requested "
        f"{asked} tokens{in_detail}. Please reduce the length of the {param} or completion.",
        param=param,
        code="context_length_exceeded",
    )


async def completion_prompts(
    body: CompletionBody, text_model: TextModel, limits: Limits
) -> list[Prompt]:
    """The prompts of a completion, one or more. Raises RequestError (400)."""
    texts, result = _texts(body.prompt), _tokens(body.prompt)
    for text in texts:
        if body.truncate_prompt_tokens is None:
            _check_length(text, text_model, limits, "prompt")
    special = body.add_special_tokens is not False
    encoded = await text_model.encode_all(texts, add_special_tokens=special)
    result += [Prompt(tokens, text) for tokens, text in zip(encoded, texts, strict=True)]
    if body.truncate_prompt_tokens is not None:
        cut = [truncated(prompt.tokens, body, limits) for prompt in result]
        result = [
            prompt if len(prompt.tokens) == len(tokens) else Prompt(tokens, None)
            for prompt, tokens in zip(result, cut, strict=True)
        ]
    for prompt in result:
        if not prompt.tokens:
            raise RequestError(400, "The prompt has no tokens.", param="prompt")
        if len(prompt.tokens) > limits.context:
            raise too_long(limits, str(len(prompt.tokens)), "prompt")
        if max(prompt.tokens) >= limits.vocab_size:
            message = f"Token id {max(prompt.tokens)} is not below {limits.vocab_size}."
            raise RequestError(400, message, param="prompt")
    return result


def truncated(tokens: list[int], body: SamplingBody, limits: Limits) -> list[int]:
    """As many tokens as the body allows, or as the context holds if that is -1."""
    limit = body.truncate_prompt_tokens
    if limit is None:
        return tokens
    kept = limits.context - 1 if limit == -1 else limit
    if body.truncation_side == "right":
        return tokens[:kept]
    return tokens[-kept:] if kept else []


async def chat_prompt(body: ChatBody, text_model: TextModel, limits: Limits) -> Prompt:
    """The prompt of a conversation. Raises RequestError (400)."""
    template = text_model.chat_template
    if template is None:
        message = "This model has no chat template; start the router with --chat-template."
        raise RequestError(400, message, param="messages")
    messages = [_plain(message, template.knows_developer) for message in body.messages]
    if body.truncate_prompt_tokens is None:
        _check_length("".join(m["content"] for m in messages), text_model, limits, "messages")
    if body.continue_final_message:
        messages[-1]["content"] += f"{_END} "
    tools = None
    if body.offers_tools:
        tools = [tool.model_dump(exclude_none=True) for tool in body.callable_tools]
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
        variables.setdefault("enable_thinking", body.reasoning_effort != "none")
    opens = body.add_generation_prompt is not False and not body.continue_final_message
    text = template.render(messages, opens, tools, variables, body.documents)
    if body.continue_final_message:
        text = _unfinished(text)
    special = body.add_special_tokens is True  # the template has them already
    (tokens,) = await text_model.encode_all([text], add_special_tokens=special)
    tokens = truncated(tokens, body, limits)
    if not tokens:
        raise RequestError(400, "The messages have no tokens.", param="messages")
    return Prompt(tokens, text)


def _unfinished(text: str) -> str:
    """A conversation that ends where its last message does. What a template takes off the end of
    messages it takes off this one."""
    place = text.rfind(_END)
    if place < 0:
        message = "The chat template does not show the final message."
        raise RequestError(400, message, param="continue_final_message")
    return text[:place] if text.startswith(f"{_END} ", place) else text[:place].rstrip()


def _texts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str]:
    """The prompts that are given as text; all of them are, or none."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt[0], str):
        return []
    return [part for part in prompt if isinstance(part, str)]


def _tokens(prompt: str | list[int] | list[str] | list[list[int]]) -> list[Prompt]:
    """The prompts that are given as token ids."""
    if isinstance(prompt, str):
        return []
    if isinstance(prompt[0], int):
        return [Prompt(prompt, None)]
    return [Prompt(part, None) for part in prompt if isinstance(part, list)]


def _check_length(text: str, text_model: TextModel, limits: Limits, param: str) -> None:
    """Refuse a text that is too long whatever its tokens are, before the work of encoding it."""
    least = len(text) // text_model.longest_token
    if least > limits.context:
        raise too_long(limits, f"at least {least}", param)


def _plain(message: Message, knows_developer: bool) -> dict[str, Any]:
    """A message as templates expect it: text content, decoded tool arguments."""
    role = message.role
    if role == "developer" and not knows_developer:
        role = "system"
    plain: dict[str, Any] = {"role": role, "content": message.text}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    reasoning = message.reasoning_content
    if (reasoning := message.reasoning if reasoning is None else reasoning) is not None:
        plain["reasoning_content"] = reasoning
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _decoded(call.function.arguments or "{}"),
                },
            }
            for call in message.tool_calls
        ]
    return plain


def _decoded(arguments: str) -> object:
    """Templates write the arguments as JSON themselves; what is no JSON, or more of it than a
    template should walk through, stays as it is."""
    try:
        value: object = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if is_small(value) else arguments
