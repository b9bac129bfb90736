"""The output of a response, item by item: reasoning, messages, calls of functions.

`Items` takes what a chat says (`router.said.Piece`) and answers with the events that say so to a
client; `output` is what came of it so far. Owned by `router.response_answer`.
"""

from collections.abc import Sequence
from typing import Any, Final
from uuid import uuid4

Event = dict[str, Any]
_PREFIX: Final = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


class Items:
    """One item is open at a time: a piece of another kind closes it."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._kind: str | None = None
        """Of the open item, the last one of `output`."""
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    @property
    def reasons(self) -> bool:
        return self._kind == "reasoning"

    def say(self, text: str, logprobs: Sequence[dict[str, Any]]) -> list[Event]:
        """Text for the reader."""
        events = [] if self._kind == "message" else self._open("message")
        self._logprobs += logprobs
        return [*events, self._add("response.output_text.delta", text, logprobs=list(logprobs))]

    def reason(self, text: str) -> list[Event]:
        events = [] if self._kind == "reasoning" else self._open("reasoning")
        return [*events, self._add("response.reasoning_text.delta", text)]

    def call(self, call_id: str, name: str) -> list[Event]:
        """A call of a function begins."""
        return self._open("function_call", call_id=call_id, name=name)

    def argue(self, arguments: str) -> list[Event]:
        """More of the arguments of the call."""
        return [self._add("response.function_call_arguments.delta", arguments)]

    def close(self, status: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """The open item is over. `logprobs`: of tokens whose text was never shown."""
        if self._kind is None:
            return []
        kind, self._kind = self._kind, None
        text = "".join(self._text)
        item = self.output[-1]
        item["status"] = status
        events: list[Event] = []
        if kind == "function_call":
            item["arguments"] = text
            done = {"type": "response.function_call_arguments.done", "name": item["name"]}
            events.append({**done, **self._place(), "arguments": text})
        else:
            self._logprobs += logprobs
            part = _part(kind, text, self._logprobs)
            item["content"] = [part]
            name = "output_text" if kind == "message" else "reasoning_text"
            said: Event = {"type": f"response.{name}.done", **self._place(0), "text": text}
            if kind == "message":
                said["logprobs"] = part["logprobs"]
            events.append(said)
            events.append({"type": "response.content_part.done", **self._place(0), "part": part})
        index = len(self.output) - 1
        events.append({"type": "response.output_item.done", "output_index": index, "item": item})
        return events

    def _open(self, kind: str, **fields: str) -> list[Event]:
        events = self.close("completed")
        self._kind, self._text, self._logprobs = kind, [], []
        item: dict[str, Any] = {
            "type": kind,
            "id": f"{_PREFIX[kind]}_{uuid4().hex}",
            "status": "in_progress",
            **fields,
        }
        match kind:
            case "function_call":
                item["arguments"] = ""
            case "message":
                item |= {"role": "assistant", "content": []}
            case "reasoning":
                item |= {"summary": [], "content": []}
        self.output.append(item)
        index = len(self.output) - 1
        added = {"type": "response.output_item.added", "output_index": index, "item": dict(item)}
        events.append(added)
        if kind != "function_call":
            part = _part(kind, "", ())
            events.append({"type": "response.content_part.added", **self._place(0), "part": part})
        return events

    def _add(self, type: str, text: str, **fields: object) -> Event:
        self._text.append(text)
        is_part = self._kind != "function_call"
        return {"type": type, **self._place(0 if is_part else None), "delta": text, **fields}

    def _place(self, content: int | None = None) -> dict[str, Any]:
        place = {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}
        return place if content is None else {**place, "content_index": content}


def _part(kind: str, text: str, logprobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
