"""Which web pages may call the API from a browser (CORS): from flags to what Starlette is told."""

from dataclasses import dataclass

import msgspec

from common.config import HttpConfig
from common.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Cors:
    origins: tuple[str, ...] = ()
    """`*`: all; none: no page, and preflights are answered like any unknown call."""
    methods: tuple[str, ...] = ("*",)
    headers: tuple[str, ...] = ("*",)
    credentials: bool = False

    @classmethod
    def of(cls, config: HttpConfig) -> "Cors":
        """Raises ConfigError."""
        return cls(
            origins=_list("--allowed-origins", config.allowed_origins or ""),
            methods=_list("--allowed-methods", config.allowed_methods),
            headers=_list("--allowed-headers", config.allowed_headers),
            credentials=config.allow_credentials,
        )


def _list(flag: str, text: str) -> tuple[str, ...]:
    """With commas between, or as vLLM takes it: a JSON list."""
    if not text.startswith("["):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        return msgspec.json.decode(text, type=tuple[str, ...])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{flag} {text} is no JSON list of texts") from error
