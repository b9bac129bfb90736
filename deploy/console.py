"""What `tandem up` writes: state lines, the lines of its children, and the ready message.

Everything goes to stderr but the ready message. Written by the supervisor only.
"""

import logging
import re
import sys
from collections.abc import Iterable

ERROR_LINE = re.compile(r"^tandem [a-z]+: error: (.*)$")
"""How a role says why it cannot run as configured (see `deploy.cli`)."""

log = logging.getLogger(__name__)


def _write(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class Console:
    """Text for people, or JSON: then every line is one object, also those of children."""

    def __init__(self, json: bool) -> None:
        self._json = json
        self._width = 10

    def state(self, name: str, state: str, detail: str = "") -> None:
        """One line per change of a process: loading, ready, exited and so on."""
        if self._json:
            log.info(state, extra={"child": name, "detail": detail})
        else:
            _write(f"{name:<{self._width}} {state:<8} {detail}".rstrip())

    def note(self, text: str) -> None:
        """Something that the operator should know."""
        if self._json:
            log.info(text)
        else:
            _write(text)

    def line(self, name: str, text: str) -> None:
        """A line that a child wrote. Its reason to give up is left to whoever reports its end."""
        if ERROR_LINE.match(text):
            return
        if self._json and text.startswith("{"):
            _write(text)
        elif self._json:
            log.info(text, extra={"child": name})
        else:
            _write(f"{name:<{self._width}} | {text}")

    def tail(self, name: str, lines: Iterable[str]) -> None:
        """The last lines of a process that failed, together (others wrote in between)."""
        self.note(f"The last lines of {name}:")
        for text in lines:
            self.note("  " + text)

    def ready(self, lines: Iterable[str]) -> None:
        print("\n".join(lines), flush=True)


def error_in(tail: Iterable[str]) -> str | None:
    """The reason that a role gave for its end, if it gave one among its last lines."""
    found = [match[1] for text in tail if (match := ERROR_LINE.match(text))]
    return found[-1] if found else None
