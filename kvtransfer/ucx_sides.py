"""The UCX workers of a helper process, and what it knows of each connection.

Used by `ucx_process` alone, in its process.
"""

import os
import secrets
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kvtransfer import ucx_messages as m

KIND_BITS: Final = 60
HELLO, ANSWER, ENVELOPE, BYE, BODY = (kind << KIND_BITS for kind in (1, 2, 3, 4, 8))
"""Kinds of messages: the first bits of their tags. The rest is random."""
KIND_MASK: Final = 0xF << KIND_BITS


@dataclass(eq=False)
class Side:
    """A UCX worker and how it is reached."""

    ucx: Any
    """The module of ucxx."""
    way: str
    worker: Any
    door_tag: int
    handles_errors: bool
    """UCX tells when a peer is gone. Over shared memory it cannot: there the process is watched."""
    bulk: Any
    """The UCX worker for bodies; the same one unless they go apart (see `_open_sides`)."""

    @property
    def workers(self) -> list[Any]:
        return [self.worker] if self.bulk is self.worker else [self.worker, self.bulk]

    @property
    def door(self) -> m.Door:
        """How others connect here."""
        bulk = b"" if self.bulk is self.worker else bytes(self.bulk.address)
        return m.Door(self.way, bytes(self.worker.address), bulk, self.door_tag)

    def endpoint(self, there: bytes) -> Any:
        """To the UCX worker of another helper with this address. Raises UCXError."""
        return self._make(self.worker, there, self.handles_errors)

    def bulk_endpoint(self, there: bytes) -> Any:
        """The same for bodies. Raises UCXError."""
        return self._make(self.bulk, there, False)

    def _make(self, worker: Any, there: bytes, handles_errors: bool) -> Any:
        address = self.ucx.UCXAddress.create_from_buffer(there)
        return self.ucx.UCXEndpoint.create_from_worker_address(worker, address, handles_errors)


@dataclass(eq=False)
class Arrival:
    """A data message that is coming in."""

    buffer: bytearray
    requests: list[Any]
    envelope: m.Envelope | None = None
    room: int | None = None


@dataclass(eq=False)
class Connection:
    number: int
    side: Side
    endpoint: Any
    bulk: Any
    """The endpoint for bodies; None where the peer sends them."""
    here: int
    """Tag of what the peer sends."""
    there: int = 0
    is_up: bool = False
    is_closing: bool = False
    """The worker hung up before the peer answered, which is then told so."""
    pidfd: int = -1
    arrivals: deque[Arrival] = field(default_factory=deque)
    shipping: deque[tuple[list[Any], list[Any]]] = field(default_factory=deque)
    """(requests, what they read) of each shipment."""
    others: list[tuple[Any, Any]] = field(default_factory=list)
    """The same of what belongs to no shipment."""


def open_sides(ucx: Any, is_local: bool) -> list[Side]:
    """`sm` and `net`; what the operator chose by UCX_TLS is `net` alone. `is_local`: only processes
    of this machine connect."""
    chosen = ucx.get_current_options()
    net = {"TLS": "^sm"} if chosen["TLS"] == "all" else {}
    if is_local and chosen["NET_DEVICES"] == "all":
        net["NET_DEVICES"] = "lo"
    sides = [_open_side(ucx, "net", net, True)]
    if chosen["RNDV_SCHEME"] == "auto" and not m.has_rdma():
        # Over TCP the sender's kernel writes to where the bytes belong. UCX does so where it is
        # told, and only between endpoints that do not handle errors: else it cuts a message into
        # pieces of 16 KB that are copied twice more, which takes four times as long. So bodies
        # have endpoints of their own; those for all else say when a peer is gone.
        sides[0].bulk = _open_worker(ucx, {**net, "RNDV_SCHEME": "put_zcopy"})
    if chosen["TLS"] == "all":
        # The receiver reads: a sender that was stopped meanwhile has nothing left to write.
        sm = {"TLS": "posix,cma,self", "RNDV_SCHEME": "get_zcopy"}
        sides.insert(0, _open_side(ucx, f"sm/{machine()}", sm, False))
    return sides


def _open_side(ucx: Any, way: str, options: dict[str, str], handles_errors: bool) -> Side:
    worker = _open_worker(ucx, options)
    return Side(ucx, way, worker, secrets.randbits(KIND_BITS), handles_errors, worker)


def _open_worker(ucx: Any, options: dict[str, str]) -> Any:
    features = (ucx.Feature.TAG, ucx.Feature.WAKEUP)
    worker = ucx.UCXWorker(ucx.UCXContext(options, features))
    worker.init_blocking_progress_mode()
    return worker


def machine() -> str:
    """The same for two processes that can watch each other and read each other's memory."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}/{os.geteuid()}"


def done(requests: list[Any]) -> bool:
    """Whether all are complete. Raises UCXError for one that failed."""
    if not all(request.completed for request in requests):
        return False
    for request in requests:
        request.check_error()
    return True
