"""The parts of what a chat answer says, and the marks that chat templates teach models to tell them
apart with.

Taken apart by `router.speech`; put together by `router.chat_answer` and `router.response_items`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["content", "reasoning", "call", "arguments"]
Format = Literal["none", "hermes", "llama3_json", "mistral", "list", "named"]
FORMATS: Final[tuple[Format, ...]] = ("hermes", "llama3_json", "mistral")
THINK: Final = ("<think>", "</think>")
TOOL_CALL: Final = ("<tool_call>", "</tool_call>")
TOOL_CALLS: Final = "[TOOL_CALLS]"
ARGS: Final = "[ARGS]"
CALL_ID: Final = "[CALL_ID]"
PYTHON_TAG: Final = "<|python_tag|>"
MARKERS: Final = (*THINK, *TOOL_CALL, TOOL_CALLS, ARGS, CALL_ID, PYTHON_TAG)


@dataclass(frozen=True, slots=True)
class Piece:
    kind: Kind
    text: str
    """Of a `call`: the name of the tool."""
    call: int = -1
    """Index of the call that a `call` begins and `arguments` go on."""


def detect(template: str) -> Format:
    """The form of calls that a chat template teaches."""
    if TOOL_CALL[0] in template:
        return "hermes"
    if TOOL_CALLS in template:
        return "mistral"
    if PYTHON_TAG in template or '"parameters": dictionary' in template:
        return "llama3_json"
    return "none"


def may_think(template: str) -> bool:
    """Answers may begin with reasoning: the template writes it, or takes it off what was said."""
    return any(marker in template for marker in THINK)


@dataclass(slots=True)
class Said:
    """All that one choice said."""

    content: str = ""
    reasoning: str = ""
    names: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()


def join(pieces: Sequence[Piece]) -> Said:
    said = Said()
    content: list[str] = []
    reasoning: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    for piece in pieces:
        match piece.kind:
            case "content":
                content.append(piece.text)
            case "reasoning":
                reasoning.append(piece.text)
            case "call":
                names.append(piece.text)
                arguments.append([])
            case "arguments":
                arguments[piece.call].append(piece.text)
    said.content, said.reasoning = "".join(content), "".join(reasoning)
    said.names, said.arguments = tuple(names), tuple("".join(part) for part in arguments)
    return said
