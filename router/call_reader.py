"""The call of a tool as a JSON object that comes in pieces: its name, and its arguments as text.

Made by `router.speech` where a call begins. The arguments are passed on as the model writes them.
"""

import json
from typing import Final

_ARGUMENTS: Final = ("arguments", "parameters")
MAX_HELD: Final = 65_536
"""Characters of arguments that are held back for a name that comes after them."""


class CallReader:
    """Reads one object; one with a `name` given reads the arguments alone."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.failed = False
        self._bare = name is not None
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._literal = ""
        """The string of the outer object that is being read, with its quotes."""
        self._key: str | None = "arguments" if self._bare else None
        self._is_value = self._bare
        self._held = ""
        """Arguments that came before the name."""
        self._any = False

    def push(self, text: str) -> tuple[str, str | None]:
        """(arguments to pass on, what comes after the object or None if it is not over)."""
        arguments: list[str] = []
        for i, char in enumerate(text):
            self._step(char, arguments)
            if self.failed:
                if self.name is not None and not self._any:
                    arguments.append("{}")
                return self._pass_on(arguments), text[i + 1 :]
            if self._depth == 0 and not self._in_string and char in "}]":
                if not self._any:
                    arguments.append("{}")
                return self._pass_on(arguments), text[i + 1 :]
        return self._pass_on(arguments), None

    def _pass_on(self, arguments: list[str]) -> str:
        text = self._held + "".join(arguments)
        self._held = "" if self.name is not None else text
        if len(self._held) > MAX_HELD:
            self.failed = True
        return "" if self.name is None else text

    def _step(self, char: str, arguments: list[str]) -> None:
        outer = 0 if self._bare else 1
        takes = self._is_value and self._key in _ARGUMENTS
        if self._in_string:
            if takes and self._depth > outer:
                arguments.append(char)
            else:
                self._literal += char
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                if self._depth == outer:
                    self._end_string(arguments)
            return
        if self._depth == 0 and not self._bare:
            if char == "{":
                self._depth = 1
            elif not char.isspace():
                self.failed = True
            return
        match char:
            case '"':
                self._in_string = True
                self._literal = '"'
            case "{" | "[":
                self._depth += 1
            case "}" | "]":
                self._depth -= 1
        if takes and (self._depth > outer or (char in "}]" and self._depth == outer)):
            arguments.append(char)
            self._any = True
        elif self._depth == 1 and outer == 1:
            if char == ":":
                self._is_value = True
            elif char == ",":
                self._is_value, self._key = False, None

    def _end_string(self, arguments: list[str]) -> None:
        """A string of the outer object ended: a key, the name, or arguments as a string."""
        try:
            value = json.loads(self._literal)
        except ValueError:
            self.failed = True
            return
        if not self._is_value:
            self._key = value
        elif self._key == "name" and self.name is None:
            self.name = value
        elif self._key in _ARGUMENTS:
            arguments.append(value)
            self._any = True
