"""What a chat answer says, told apart while it streams: reasoning, content, calls of tools.

A `Speech` belongs to one choice (`router.chat_answer`): text goes in as it comes, `Piece`s come
out, and nothing of a marker is ever shown. The forms of calls are those that models are trained
on: Hermes and Qwen (`<tool_call>{...}</tool_call>`), Llama 3 (`{"name": ..., "parameters": ...}`),
Mistral (`[TOOL_CALLS]` before a list or before `name{...}`); `list` and `named` are what a grammar
enforces. A text that only looks like a call is content.
"""

from router.call_reader import CallReader
from router.said import ARGS, CALL_ID, PYTHON_TAG, THINK, TOOL_CALL, TOOL_CALLS, Format, Kind, Piece


class _Marker:
    """Finds a marker in a text that comes in pieces, and holds back what may be one."""

    def __init__(self) -> None:
        self.held = ""

    def split(self, text: str, marker: str) -> tuple[str, str | None]:
        """(text before the marker, text after it or None if it did not come yet)."""
        text = self.held + text
        before, found, after = text.partition(marker)
        self.held = ""
        if found:
            return before, after
        for length in range(min(len(marker) - 1, len(text)), 0, -1):
            if marker.startswith(text[-length:]):
                self.held = text[-length:]
                return text[:-length], None
        return text, None

    def flush(self) -> str:
        held, self.held = self.held, ""
        return held


class Speech:
    """`push` every text in order, `flush` once at the end."""

    def __init__(self, format: Format, name: str = "", thinks: bool | None = None) -> None:
        """thinks: True if the prompt ends within reasoning, False if reasoning may come first,
        None if it is not looked for. name: the tool of format `named`."""
        self.num_calls = 0
        self._format = format
        self._name = name
        self._marker = _Marker()
        self._thought = "inside" if thinks else "before" if thinks is False else "over"
        self._state = "list" if format == "list" else "text"
        self._reader: CallReader | None = None
        self._raw = ""
        """Of a call whose name is not known yet: content, should it turn out to be none."""
        self._mistral_name = ""
        self._said = False
        self._trims = bool(thinks)
        """White space at the beginning of reasoning, after it, and after a call is not shown."""

    def push(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        rest = self._think(text, pieces) if self._thought != "over" else text
        if self._thought == "over" and rest:
            self._speak(rest, pieces)
        return pieces

    def flush(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._thought != "over":
            kind: Kind = "reasoning" if self._thought == "inside" else "content"
            self._add(pieces, kind, self._marker.flush())
        else:
            if self._reader is not None and self._reader.name is None:
                self._add(pieces, "content", self._raw)
            elif self._state == "name":
                self._add(pieces, "content", TOOL_CALLS + self._mistral_name)
            if self._state == "text":
                self._add(pieces, "content", self._marker.flush())
        return pieces

    def _think(self, text: str, pieces: list[Piece]) -> str:
        """Takes reasoning off; returns what comes after it."""
        if self._thought == "before":
            text = self._marker.held + text
            self._marker.held = ""
            start = text.lstrip()
            if not start or (THINK[0].startswith(start) and start != THINK[0]):
                self._marker.held = text
                return ""
            if not start.startswith(THINK[0]):
                self._thought = "over"
                return text
            self._thought = "inside"
            text = start.removeprefix(THINK[0])
            self._trims = True
        before, after = self._marker.split(text, THINK[1])
        self._add(pieces, "reasoning", before)
        if after is None:
            return ""
        self._thought = "over"
        self._trims = True
        return after

    def _trim(self, text: str) -> str:
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        return text

    def _speak(self, text: str, pieces: list[Piece]) -> None:
        if self._format == "none":
            self._add(pieces, "content", text)
            return
        if self._format == "named":
            if self.num_calls == 0:
                self._begin(pieces, self._name)
            self._add(pieces, "arguments", text)
            return
        rest: str | None = text
        while rest:
            rest = getattr(self, f"_in_{self._state}")(rest, pieces)

    def _in_text(self, text: str, pieces: list[Piece]) -> str | None:
        if self._format == "llama3_json":
            return self._in_llama(text, pieces)
        opening = TOOL_CALL[0] if self._format == "hermes" else TOOL_CALLS
        before, after = self._marker.split(text, opening)
        self._add(pieces, "content", before)
        if after is None:
            return None
        if self._format == "hermes":
            self._open_reader(opening)
        else:
            self._state = "form"
        return after

    def _in_llama(self, text: str, pieces: list[Piece]) -> str | None:
        """A call is the first thing that is said, or comes after another one."""
        text = self._marker.held + text
        self._marker.held = ""
        start = text.lstrip(" \n;") if self.num_calls else text.lstrip()
        if not self._said and (not start or (PYTHON_TAG.startswith(start))):
            self._marker.held = text
            return None
        start = start.removeprefix(PYTHON_TAG).lstrip()
        if not self._said and start.startswith("{"):
            self._open_reader("")
            return start
        if not self._said and not start:
            self._marker.held = text
            return None
        self._said = True
        self._add(pieces, "content", text)
        return None

    def _in_form(self, text: str, pieces: list[Piece]) -> str | None:
        """Mistral: a list of calls, or a name before its arguments."""
        start = text.lstrip()
        if not start:
            return None
        self._mistral_name = ""
        self._state = "list" if start.startswith("[") else "name"
        return start

    def _in_name(self, text: str, pieces: list[Piece]) -> str | None:
        self._mistral_name += text
        name, brace, after = self._mistral_name.partition("{")
        if not brace:
            return None
        name = name.removesuffix(ARGS).partition(CALL_ID)[0].strip()
        if not name:
            self._state = "raw"
            return TOOL_CALLS + self._mistral_name
        self._trims = False
        self._reader = CallReader(name)
        self._state = "call"
        self._raw = ""
        self._begin(pieces, name)
        return brace + after

    def _in_list(self, text: str, pieces: list[Piece]) -> str | None:
        """Between the calls of a list."""
        start = text.lstrip("[, \n\t")
        if not start:
            return None
        if start.startswith("{"):
            self._open_reader("")
            return start
        if start.startswith("]"):
            self._state = "text" if self._format == "mistral" else "over"
            return start[1:]
        self._state = "raw"  # no list of calls after all
        return start

    def _in_raw(self, text: str, pieces: list[Piece]) -> str | None:
        self._add(pieces, "content", text)
        return None

    def _in_over(self, text: str, pieces: list[Piece]) -> str | None:
        return None

    def _in_closing(self, text: str, pieces: list[Piece]) -> str | None:
        """Hermes: after the object of a call, until its closing marker."""
        _, after = self._marker.split(text, TOOL_CALL[1])
        if after is not None:
            self._state = "text"
        return after

    def _open_reader(self, raw: str) -> None:
        self._reader = CallReader()
        self._raw = raw
        self._state = "call"
        self._trims = False

    def _in_call(self, text: str, pieces: list[Piece]) -> str | None:
        reader = self._reader
        assert reader is not None
        known = reader.name
        arguments, rest = reader.push(text)
        if known is None:
            self._raw += text
            if reader.name is not None:
                self._begin(pieces, reader.name)
        if reader.name is not None:
            self._add(pieces, "arguments", arguments)
        if rest is None:
            return None
        if reader.failed and reader.name is not None:
            # What follows is no call; the one that was begun stays.
            self._reader = None
            self._state = "raw"
            return rest
        if reader.name is None:
            self._add(pieces, "content", self._raw.removesuffix(rest))
            self._said = True
        self._reader = None
        self._trims = reader.name is not None
        if reader.failed:
            self._state = "text" if self._format != "list" else "raw"
        elif self._format == "hermes":
            self._state = "closing"
        elif self._format == "list" or (self._format == "mistral" and not self._mistral_name):
            self._state = "list"
        else:
            self._state = "text"
        return rest

    def _begin(self, pieces: list[Piece], name: str) -> None:
        pieces.append(Piece("call", name, self.num_calls))
        self.num_calls += 1

    def _add(self, pieces: list[Piece], kind: Kind, text: str) -> None:
        if kind != "arguments":
            text = self._trim(text)
        if text:
            pieces.append(Piece(kind, text, self.num_calls - 1 if kind == "arguments" else -1))
