"""The port of the HTTP server: checked and kept before the model is loaded. Used by `deploy.up`."""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import ConfigError, UsageError


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host {host} is no address: {error.strerror}") from error
    result = socket.socket(family, kind, protocol)
    result.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        result.bind(address)
    except OSError:
        result.close()
        raise
    return result


@contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """The port, or a free one for 0; nobody is given it by chance while this is held.

    The socket that keeps it has SO_REUSEADDR and never listens: a server that sets the same
    option can listen there. Raises ConfigError if another server listens already.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port} is not between 0 and 65535")
    try:
        with _bound(host, port) as probe:
            probe.listen(1)
            port = probe.getsockname()[1]
        with _bound(host, port):
            yield port
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is in use; choose another --port") from error
        if error.errno in (errno.EACCES, errno.EADDRNOTAVAIL):
            raise ConfigError(
                f"cannot listen on port {port} of {host}: {error.strerror}"
            ) from error
        raise


def url_of(host: str, port: int, tls: bool = False) -> str:
    """The URL under which this machine reaches a server that binds `host`."""
    name = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if tls else "http"
    return f"{scheme}://[{name}]:{port}" if ":" in name else f"{scheme}://{name}:{port}"
