"""Single tokens as text and as bytes, for logprobs. Used by the answers."""

import re
from typing import Final

from router.tokenizer import TextModel

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte in the vocabulary of byte-level BPE (the table of GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class TokenText:
    def __init__(self, text_model: TextModel) -> None:
        self._text_model = text_model
        # Decoders strip the leading space of a first token; this one takes the loss.
        self._anchor = text_model.encode_now("a", add_special_tokens=False)[-1:]
        self._anchor_text = text_model.decode(self._anchor, skip_special_tokens=False)

    def text(self, token: int) -> str:
        """The token's text; U+FFFD for bytes that are no character alone."""
        text = self._text_model.decode([*self._anchor, token], skip_special_tokens=False)
        return text.removeprefix(self._anchor_text)

    def raw(self, token: int) -> bytes:
        """The token's bytes: several tokens together may make one character."""
        text = self.text(token)
        name = self._text_model.backend.id_to_token(token)
        if "\ufffd" not in text or name is None:
            return text.encode()
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(match[1], 16)])
        if all(char in _ALPHABET for char in name):
            return bytes(_ALPHABET[char] for char in name)
        return text.encode()


_ALPHABET: Final = _byte_alphabet()
