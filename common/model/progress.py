"""A bar on the terminal while the weights load; silent where nobody watches."""

import sys
from types import TracebackType
from typing import Final, Self

WIDTH: Final = 30
CLEAR_LINE: Final = "\r\x1b[K"


class ProgressBar:
    """Counts `total` steps on one line of stderr, which is cleared at the end. A context manager;
    writes nothing if stderr is not a terminal."""

    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = total
        self._done = 0
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> Self:
        self._show()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown:
            print(CLEAR_LINE, end="", file=sys.stderr, flush=True)

    def advance(self) -> None:
        """One more step is done."""
        self._done += 1
        self._show()

    def _show(self) -> None:
        if not self._shown:
            return
        filled = WIDTH * self._done // self._total
        bar = "#" * filled + "." * (WIDTH - filled)
        percent = 100 * self._done // self._total
        line = f"{CLEAR_LINE}{self._title} [{bar}] {percent}%"
        print(line, end="", file=sys.stderr, flush=True)
