"""How much one HTTP call may ask for. Made by `router.main` from flags; what is above is refused
with the OpenAI error body before anything else is done with it.
"""

from dataclasses import dataclass
from typing import Final

from common.config import HttpConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    n: int = 128
    best_of: int = 128
    logprobs: int = 20
    """Of completions, chats and prompts alike."""
    stop: int = 16
    """Stop strings, and stop token ids."""
    stop_length: int = 1_024
    """Characters of one stop string."""
    logit_bias: int = 1_024
    messages: int = 2_048
    """Of a chat; items of the input of a response."""
    body_bytes: int = 16 << 20
    header_bytes: int = 32 << 10
    """Request line, headers and trailers of one request."""
    json_depth: int = 64
    json_values: int = 2**20
    """Commas and opening brackets of a body, its texts included: see `nesting.has_few`."""
    upload_s: float = 60
    """How long a body may take to arrive."""

    @classmethod
    def of(cls, config: HttpConfig) -> "Caps":
        return cls(**{name: getattr(config, f"max_{name}") for name in cls.__slots__})


DEFAULT: Final = Caps()
