"""API keys: whose they are. One from the configuration, any number from a file and from Redis
(`router.shared_keys`); only their hashes are kept.

The file has one key per line, `TENANT SHA256`, where SHA256 is the key's hash in hex:
`printf %s KEY | sha256sum`. A tenant may have several keys. Empty lines and lines with `#` first
are skipped. A changed file is read within a second; a bad one is logged, and the keys before it
stay. Asked by `router.auth`.
"""

import hmac
import logging
import re
import time
from hashlib import sha256
from pathlib import Path
from typing import Final

from common.errors import ConfigError

RELOAD_S: Final = 1.0
_TENANT: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")
log = logging.getLogger(__name__)

Entry = tuple[bytes, str]
"""(hash, tenant)"""
Entries = tuple[Entry, ...]


class Keys:
    def __init__(
        self, api_key: str | None = None, path: Path | None = None, *, are_shared: bool = False
    ) -> None:
        """api_key: of no tenant. are_shared: there are keys in Redis too, which
        `router.shared_keys` brings. Raises ConfigError, in one line."""
        self.shared: Entries = ()
        self._are_shared = are_shared
        self._own: Entries = ()
        if api_key is not None:
            self._own = ((sha256(api_key.encode()).digest(), ""),)
        self._path = path
        self._entries: Entries = ()
        self._seen: tuple[int, int, int] | None = None
        self._next_look = 0.0
        if path is not None:
            self._seen = self._stamp(path)
            self._entries = read(path)

    @property
    def are_asked_for(self) -> bool:
        return bool(self._own) or self._path is not None or self._are_shared

    def tenant(self, given: bytes) -> str | None:
        """Whose key this is (empty: the configured one), None if it is nobody's.

        Every entry is compared, in a time that does not depend on how much of it is right.
        """
        self._reload()
        digest = sha256(given).digest()
        found: str | None = None
        for wanted, tenant in (*self._own, *self._entries, *self.shared):
            if hmac.compare_digest(digest, wanted):
                found = tenant
        return found

    def _reload(self) -> None:
        now = time.monotonic()
        if self._path is None or now < self._next_look:
            return
        self._next_look = now + RELOAD_S
        try:
            stamp = self._stamp(self._path)
            if stamp == self._seen:
                return
            self._seen = stamp
            self._entries = read(self._path)
            log.info("%d API keys from %s", len(self._entries), self._path)
        except ConfigError as error:
            log.error("the API keys stay as they were: %s", error)

    def _stamp(self, path: Path) -> tuple[int, int, int]:
        """Changes when the file does."""
        try:
            stat = path.stat()
        except OSError as error:
            raise ConfigError(f"--api-keys {path} cannot be read: {error.strerror}") from error
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def read(path: Path) -> Entries:
    """The keys of a file. Raises ConfigError, which never shows what a line holds."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--api-keys {path} cannot be read: {error}") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            entries.append(entry(*line.split()))
        except (ConfigError, TypeError):
            message = f"--api-keys {path}: line {number} is not 'TENANT SHA256'"
            raise ConfigError(message) from None
    return tuple(entries)


def entry(tenant: str, digest: str) -> Entry:
    """Raises ConfigError, which never shows what it was given."""
    if _TENANT.fullmatch(tenant) is None or _DIGEST.fullmatch(digest) is None:
        raise ConfigError("an entry is not a tenant and the SHA-256 of a key in hex")
    return bytes.fromhex(digest), tenant
