"""Identities of a checkpoint: whose KV blocks are the same, and whose text is the same.

Computed once at the start of a worker (both) and of a router (`text_id`); opaque to everyone
else. No torch in this module.
"""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Final

from common.errors import ModelError
from common.shards import Shard, read_shard, shard_paths

ID_BYTES: Final = 16
SAMPLE_BYTES: Final = 1 << 20
"""Bytes of each shard's data that enter `content_id`."""
NUM_WINDOWS: Final = 16
CONFIG_FILE: Final = "config.json"
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
"""One of these must be there."""
TEXT_FILES: Final = (
    *TOKENIZER_FILES,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
)


class _Digest:
    """A hash over named parts; lengths are hashed too, so that no two lists of parts are alike."""

    def __init__(self, purpose: bytes) -> None:
        self._hash = blake2b(digest_size=ID_BYTES, person=purpose)

    def add(self, name: str, data: bytes) -> None:
        for part in (name.encode(), data):
            self._hash.update(len(part).to_bytes(8, "little"))
            self._hash.update(part)

    def hex(self) -> str:
        return self._hash.hexdigest()


def content_id(directory: Path, dtype: str, quantization: str = "none") -> str:
    """Identity of the KV that a worker computes: model configuration, weights, how they are
    quantised, and KV `dtype`.

    Of the weights it takes every shard's name and header and 1 MiB of its data, so that a large
    checkpoint costs no more than a small one. Hex. Raises ModelError, in one line, for a missing
    or corrupt file.
    """
    digest = _Digest(b"tandem-content")
    digest.add("dtype", dtype.encode())
    digest.add("quantization", quantization.encode())
    digest.add(CONFIG_FILE, _read(directory / CONFIG_FILE))
    for path in shard_paths(directory):
        shard = read_shard(path)
        digest.add(path.name, shard.header)
        digest.add("data", _sample(shard))
    return digest.hex()


def text_id(directory: Path, chat_template: str | None) -> str:
    """Identity of the way from messages to token ids and back: tokenizer files and template.

    chat_template: text of a template that is used in place of the checkpoint's own. Hex. Raises
    ModelError, in one line, if there is no tokenizer or a file is corrupt.
    """
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        raise ModelError(f"no tokenizer in {directory} (looked for {', '.join(TOKENIZER_FILES)})")
    digest = _Digest(b"tandem-text")
    for name in sorted(TEXT_FILES):
        path = directory / name
        if path.exists():
            digest.add(name, _read(path))
    if chat_template is not None:
        digest.add("override", chat_template.encode())
    return digest.hex()


def _read(path: Path) -> bytes:
    """A file of the checkpoint; one that should be JSON is JSON."""
    try:
        data = path.read_bytes()
        if path.suffix == ".json":
            json.loads(data)
    except FileNotFoundError:
        raise ModelError(f"checkpoint file {path} is missing") from None
    except OSError as error:
        raise ModelError(f"cannot read checkpoint file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"checkpoint file {path} is corrupt: not valid JSON ({error})") from None
    return data


def _sample(shard: Shard) -> bytes:
    """1 MiB of a shard's data in windows spread from its first to its last byte, or all of it."""
    window = SAMPLE_BYTES // NUM_WINDOWS
    if shard.data_bytes <= SAMPLE_BYTES:
        ranges = [(0, shard.data_bytes)]
    else:
        last = shard.data_bytes - window
        ranges = [(last * i // (NUM_WINDOWS - 1), window) for i in range(NUM_WINDOWS)]
    try:
        with shard.path.open("rb") as file:
            parts = []
            for start, count in ranges:
                file.seek(shard.data_start + start)
                parts.append(file.read(count))
    except OSError as error:
        raise ModelError(f"cannot read checkpoint file {shard.path}: {error.strerror}") from None
    return b"".join(parts)
