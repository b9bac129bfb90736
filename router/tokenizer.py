"""Text to token ids and back, without torch: `tokenizer.json` through the tokenizers library.

What tokenizer.json says about special tokens around a text is what counts (as in transformers 5,
which ignores `add_bos_token` of tokenizer_config.json beside it).

Owns the checkpoint's tokenizer, its chat template and the threads that encode long prompts; called
by `router.prompts` (prompts) and by `router.detokenizer` and `router.token_text` (tokens to text).
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from common.errors import ConfigError
from router.chat_template import ChatTemplate

LONG_TEXT = 8_000
"""Characters (about 2,000 tokens) of all prompts of a call beyond which a thread encodes them."""
LONG_TOKENS = 2_000
"""Token ids beyond which a thread decodes them."""
NUM_THREADS = 2
FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""What a router needs of a Hub checkpoint."""


def locate(model: str, revision: str | None) -> Path:
    """The directory with the tokenizer files of `model`, a directory or a Hub id.

    Raises ConfigError in one line.
    """
    directory = Path(model)
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ConfigError(
            f"--model {model} is neither a directory nor a Hub model that can be fetched: {reason}"
        ) from error


class TextModel:
    """The tokenizer and the chat template of one checkpoint."""

    def __init__(self, directory: Path, chat_template: str | None = None) -> None:
        """`chat_template` is a file that replaces the checkpoint's own. Raises ConfigError."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{directory} has no tokenizer.json (a fast tokenizer is needed)")
        try:
            self.backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a bad file
            raise ConfigError(f"{path} cannot be read: {error}") from error
        # Padding and truncation of training must not touch prompts.
        self.backend.no_padding()
        self.backend.no_truncation()
        settings = _read_json(directory / "tokenizer_config.json")
        special = _special_tokens(directory, settings)
        self._add_named_tokens(special)
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = len(vocabulary)
        self.longest_token = max(map(len, vocabulary), default=1)
        """Characters; a text has at least its length divided by this of tokens."""
        self._special_ids = frozenset(
            token
            for token, added in self.backend.get_added_tokens_decoder().items()
            if added.special
        )
        self.chat_template: ChatTemplate | None = None
        source = _template_source(directory, settings, chat_template)
        if source is not None:
            self.chat_template = ChatTemplate(source, special)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenize")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def decode_long(self, tokens: Sequence[int]) -> str:
        """Their text, special tokens shown; in a thread where they are many."""
        decode = partial(self.decode, tokens, skip_special_tokens=False)
        if len(tokens) <= LONG_TOKENS:
            return decode()
        return await asyncio.get_running_loop().run_in_executor(self._threads, decode)

    async def encode_all(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of each text; long texts are encoded in a thread while the loop runs on."""

        def encode() -> list[list[int]]:
            return [self.encode_now(text, add_special_tokens=add_special_tokens) for text in texts]

        if sum(map(len, texts)) <= LONG_TEXT:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)

    def encode_now(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        # The batch call is the one that releases the GIL.
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.backend.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def is_silent(self, token: int, skip_special_tokens: bool) -> bool:
        """The token has no text: special and skipped, or unknown to the tokenizer (padding)."""
        if token in self._special_ids:
            return skip_special_tokens
        return self.backend.id_to_token(token) is None

    def _add_named_tokens(self, special: Mapping[str, str]) -> None:
        """Special tokens that only tokenizer_config.json knows."""
        missing = [token for token in special.values() if self.backend.token_to_id(token) is None]
        if missing:
            self.backend.add_special_tokens([AddedToken(t, special=True) for t in missing])


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, empty if there is no such file. Raises ConfigError."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def _special_tokens(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like by name, as templates see them."""
    named = _read_json(directory / "special_tokens_map.json") | dict(settings)
    result: dict[str, str] = {}
    for name, value in named.items():
        if not name.endswith("_token"):
            continue
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            result[name] = content
    return result


def _template_source(
    directory: Path, settings: Mapping[str, Any], override: str | None
) -> str | None:
    """The template text: the given file, `chat_template.jinja`, or tokenizer_config.json."""
    path = Path(override) if override is not None else directory / "chat_template.jinja"
    if override is not None or path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"chat template {path} cannot be read: {error}") from error
    source = settings.get("chat_template")
    if source is None:
        source = _read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(source, list):
        # Several named templates: the one called default is for plain chats.
        source = {item["name"]: item["template"] for item in source}.get("default")
    return source if isinstance(source, str) else None
