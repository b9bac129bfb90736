"""Tokens to text, one token at a time, and stop strings: what a choice may show and when it ends.

`Detokenizer` and `StopMatcher` belong to one choice each (`router.request`). Together the pieces
that they return are the decoded text up to the stop string: nothing is shown twice, nothing of a
half character or of a stop string is ever shown.
"""

from collections.abc import Collection, Sequence

from router.tokenizer import TextModel

_UNKNOWN = "\ufffd"
_MAX_HELD = 3
"""Bytes of a UTF-8 character that can be there while the character is not complete."""
_WINDOW = 16
"""Tokens that are decoded again for each new one, at most, once their text is settled."""
_MAX_WINDOW = 512
"""Tokens after which text without a settled end is shown as it is."""


class Detokenizer:
    """Incremental decoding: `push` returns the new text, `flush` what was held back.

    Decodes a window of the newest tokens and shows what it adds. The window starts where the text
    was settled (no character half done), because decoders look at their neighbours: at the
    leading space of a first word, at bytes that make a character together.
    """

    def __init__(
        self,
        text_model: TextModel,
        *,
        skip_special_tokens: bool = True,
        visible: Collection[int] = (),
    ) -> None:
        """visible: special tokens that are shown although the others are skipped."""
        self._text_model = text_model
        self._skip = skip_special_tokens
        self._visible = visible
        self._window: list[int] = []
        self._shown = ""
        """Text of the window that was returned."""
        self._settled = 0
        """Tokens of the window up to the last but one settled place: where it may be cut."""
        self._next_settled = 0

    def push(self, tokens: Sequence[int]) -> str:
        if len(tokens) == 1:
            return self._push(tokens[0])
        return "".join([self._push(token) for token in tokens])

    def flush(self) -> str:
        """The text that waits for more bytes, which will not come."""
        text = self._decode(self._window)
        rest = text[len(self._shown) :] if text.startswith(self._shown) else ""
        self._window.clear()
        self._shown = ""
        self._settled = self._next_settled = 0
        return rest

    def _push(self, token: int) -> str:
        if self._text_model.is_silent(token, self._skip) and token not in self._visible:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        held = 0
        while held < _MAX_HELD and text.endswith(_UNKNOWN * (held + 1)):
            held += 1
        if held and len(self._window) > _MAX_WINDOW:
            held = 0
        settled = text[: len(text) - held] if held else text
        if not text.startswith(self._shown):
            # A byte that spoils characters already shown: go on after them.
            del self._window[:-1]
            self._shown = ""
            self._settled = self._next_settled = 0
            text = self._decode(self._window)
            settled, held = (text, 0) if not text.endswith(_UNKNOWN) else ("", 1)
        new = settled[len(self._shown) :]
        if len(settled) > len(self._shown):
            self._shown = settled
        if held == 0 and new:
            self._settled, self._next_settled = self._next_settled, len(self._window)
            if len(self._window) > _WINDOW:
                self._cut()
        return new

    def _cut(self) -> None:
        """Forget the tokens before the last but one settled place, if the rest stands alone."""
        if self._settled == 0:
            return
        tail = self._window[self._settled :]
        shown = self._decode(tail)
        if not shown or not self._shown.endswith(shown):
            return
        self._window = tail
        self._shown = shown
        self._settled, self._next_settled = 0, len(tail)

    def _decode(self, tokens: Sequence[int]) -> str:
        # What is to be skipped never enters the window.
        return self._text_model.decode(tokens, skip_special_tokens=False)


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces, and holds back what may be one.

    The match that ends first wins, of several the longest: the same whatever the pieces are.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._include = include
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found; then nothing more may be pushed."""

    def push(self, text: str, *, armed: bool = True) -> str:
        """The text that may be shown. `armed` False: too early for a stop (`min_tokens`)."""
        assert self.matched is None, "pushed after the stop"
        if not self._stops:
            return text
        text = self._held + text
        if not armed:
            return text
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or start + len(stop) < best[0]):
                best = (start + len(stop), start)
                self.matched = stop
        if best is not None:
            end, start = best
            self._held = ""
            return text[: end if self._include else start]
        held = self._may_begin(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
