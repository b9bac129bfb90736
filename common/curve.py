"""CurveZMQ keys: who may connect to whom between the processes of a deployment.

Every process has a key pair, and a directory of the public keys that it accepts, in the file
format of `zmq.auth` (`tandem keygen` writes them). Used by both ends of the router-worker link and
of the KV transfer's control link. A key that is not in the directory is refused, and both ends say
so: a listener when it is asked, a dialler before it connects or when it is told.
"""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
import zmq.auth
from zmq.auth.asyncio import AsyncioAuthenticator

from common.config import CurveConfig
from common.errors import ConfigError

log = logging.getLogger("tandem.curve")


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """Keys as Z85 text of 40 characters."""

    public: bytes
    secret: bytes
    allowed: frozenset[bytes]

    @classmethod
    def load(cls, config: CurveConfig) -> "CurveKeys | None":
        """The keys that the configuration names, None if it names none. Raises ConfigError."""
        if config.curve_key is None or config.curve_allow is None:
            return None
        public, secret = _read(Path(config.curve_key))
        if secret is None:
            raise ConfigError(f"--curve-key {config.curve_key} holds no secret key")
        directory = Path(config.curve_allow)
        if not directory.is_dir():
            raise ConfigError(f"--curve-allow {directory} is no directory")
        allowed = frozenset(_read(path)[0] for path in sorted(directory.glob("*.key")))
        if not allowed:
            raise ConfigError(
                f"--curve-allow {directory} holds no *.key file: nobody could connect"
            )
        return cls(public, secret, allowed)

    def listen(self, socket: "zmq.Socket[Any] | zmq.asyncio.Socket") -> None:
        """Before `bind`: only peers with an allowed key get in, while a `Gate` is open."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)


@dataclass(frozen=True, slots=True)
class Caller:
    """One end that connects. `server` is the public key that the other end announces, empty if
    it has none."""

    keys: CurveKeys | None
    server: str

    @property
    def objection(self) -> str:
        """Why it must not connect; empty if it may."""
        if self.keys is None:
            return "it wants a key, and --curve-key is not set here" if self.server else ""
        if not self.server:
            return "it has no key, and --curve-key is set here"
        if self.server.encode() not in self.keys.allowed:
            return f"its key {self.server} is not in --curve-allow"
        return ""

    def prepare(self, socket: "zmq.Socket[Any] | zmq.asyncio.Socket") -> None:
        """Before `connect`: talk to the holder of the key `server` and to nobody else."""
        if self.keys is not None:
            socket.setsockopt(zmq.CURVE_PUBLICKEY, self.keys.public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, self.keys.secret)
            socket.setsockopt(zmq.CURVE_SERVERKEY, self.server.encode())


class Gate:
    """Answers, for all listening sockets of a context, whether a key may connect."""

    def __init__(self, context: zmq.Context[Any], keys: CurveKeys) -> None:
        """Call in the running loop, before any socket of `context` is bound."""
        self._keys = keys
        self._authenticator = AsyncioAuthenticator(context)
        self._authenticator.configure_curve_callback(credentials_provider=self)
        self._authenticator.start()

    def callback(self, domain: str, key: bytes) -> bool:
        """Called by the authenticator for each connection."""
        if key in self._keys.allowed:
            return True
        log.warning("refused a connection: key %s is not in --curve-allow", key.decode())
        return False

    async def close(self) -> None:
        """Before the context is terminated."""
        self._authenticator.stop()
        await asyncio.sleep(0)  # its task takes note of its end


def generate(directory: Path, name: str) -> tuple[Path, Path]:
    """Write a new pair: `name.key` (public) and `name.key_secret` (for its owner's eyes only).

    Raises ConfigError if there is one of that name, or the directory cannot be written.
    """
    if not name or Path(name).name != name:
        raise ConfigError(f"{name!r} is no name for a key file")
    if (directory / f"{name}.key_secret").exists() or (directory / f"{name}.key").exists():
        raise ConfigError(f"{directory / name}.key is there already")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        secret = directory / f"{name}.key_secret"
        secret.touch(mode=0o600)
        public_file, secret_file = zmq.auth.create_certificates(directory, name)
    except OSError as error:
        raise ConfigError(f"cannot write keys to {directory}: {error.strerror}") from error
    return Path(public_file), Path(secret_file)


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the key file {path}: {error}") from None
