"""The helper process of a worker that moves blocks over UCX: `python -m kvtransfer.ucx_process`.

Started by `ucx_transport`, which hands it a socket pair, the pool (mapped read-only) and rooms for
what comes in. UCX lives here and not in the worker because its fatal errors end their process, its
requests cannot always be cancelled, and some of its calls never return when a peer is gone: here
all of that is a lost connection. Nothing that a peer writes, early or late, can reach a slot.

One thread does everything: it progresses the UCX workers until nothing moves and then sleeps in
`poll` on their descriptors. A second one only ends the process when the worker has ended.
"""

import mmap
import os
import secrets
import select
import socket
import sys
from importlib import import_module
from threading import Thread
from time import monotonic
from typing import Any, Final

import msgspec

from common.errors import ProtocolError
from kvtransfer import ucx_messages as m
from kvtransfer.ucx_sides import (
    ANSWER,
    BODY,
    BYE,
    ENVELOPE,
    HELLO,
    KIND_BITS,
    KIND_MASK,
    Arrival,
    Connection,
    Side,
    done,
    open_sides,
)

MAX_CONTROL_BYTES: Final = 1 << 20
MAX_RECEIVING: Final = 3
"""Rooms that one connection may fill at a time: one that stalls leaves the others to others."""
BURST: Final = 256
"""Steps of progress between two looks at everything else."""
FD_BYTES: Final = 4
POLL_MS: Final = int(m.ALIVE_S * 1000)
MAX_GRAVES: Final = 1000
"""Endpoints of connections that are over: with so many the helper ends, and the worker starts
another one. Each keeps memory of UCX, tens of kilobytes."""
MAX_LEAVING: Final = 128
"""Shipments to lost peers that do not come to an end, as endpoints for bodies do not say that a
peer is gone: the same holds for them. Each keeps what it reads."""


class Gone(Exception):
    """A connection cannot go on; the text is the reason."""


class Helper:
    def __init__(self, settings: m.Settings) -> None:
        self._ucx = import_module("ucxx._lib.libucxx")
        self._array = import_module("ucxx._lib.arr").Array
        self._link = socket.socket(fileno=settings.link_fd)
        self._pool = memoryview(
            mmap.mmap(settings.pool_fd, settings.pool_bytes, prot=mmap.PROT_READ)
        )
        rooms = mmap.mmap(settings.rooms_fd, m.NUM_ROOMS * settings.room_bytes)
        self._rooms = memoryview(rooms)
        self._room_bytes = settings.room_bytes
        self._free = list(range(m.NUM_ROOMS))
        self._connections: dict[int, Connection] = {}
        self._tags: dict[int, Connection] = {}
        self._orphans: list[Arrival] = []
        """Still being received for a connection that is over."""
        self._leaving: list[tuple[list[Any], Any]] = []
        """(requests, what they read): still being sent for a connection that is over."""
        self._graves: list[tuple[Any, Any]] = []
        """(endpoint, its closing). Never freed: the destructors of UCX may wait for a peer that is
        gone."""
        self._strangers: list[tuple[Side, int, Any, bytearray]] = []
        """Messages for no connection: (side, tag, request, bytes)."""
        self._poll = select.poll()
        self._poll.register(self._link, select.POLLIN)
        self._sides = open_sides(self._ucx, settings.is_local)
        for side in self._sides:
            for worker in side.workers:
                self._poll.register(worker.epoll_file_descriptor, select.POLLIN)
        self._next_number = 1
        self._said_at = monotonic()

    # ------------------------------------------------------------ the loop

    def run(self) -> None:
        self._say(m.Ready(m.address_of([side.door for side in self._sides])))
        workers = [worker for side in self._sides for worker in side.workers]
        while True:
            moved = False
            for worker in workers:
                for _ in range(BURST):
                    if not worker.progress_once():
                        break
                    moved = True
            for side in self._sides:
                moved |= self._take_messages(side)
            moved |= self._settle()
            moved |= self._read_link()
            # By the clock: over a slow network something moves all the time.
            if monotonic() - self._said_at >= m.ALIVE_S:
                self._say(m.Alive())
            if not moved and all(worker.arm() for worker in workers):
                self._sleep()

    def _sleep(self) -> None:
        ready = self._poll.poll(POLL_MS)
        watched = {c.pidfd: c for c in self._connections.values() if c.pidfd >= 0}
        for fd, _ in ready:
            if fd in watched:
                self._lose(watched[fd], "the process of the peer has ended")

    def _settle(self) -> bool:
        """Report what UCX has finished; whether there was anything."""
        moved = False
        for connection in list(self._connections.values()):
            try:
                if connection.side.handles_errors and not connection.endpoint.alive:
                    raise Gone("the peer closed the connection, or is gone")
                moved |= self._settle_connection(connection)
            except (Gone, ProtocolError, self._ucx.UCXError) as error:
                self._lose(connection, str(error))
                moved = True
        for arrival in list(self._orphans):
            if all(request.completed for request in arrival.requests):
                self._orphans.remove(arrival)
                if arrival.room is not None:
                    self._free.append(arrival.room)
        if len(self._orphans) > m.NUM_ROOMS // 2:
            raise SystemExit("too many messages of lost peers could not be cancelled")
        self._leaving = [
            (requests, data)
            for requests, data in self._leaving
            if not all(request.completed for request in requests)
        ]
        if len(self._leaving) > MAX_LEAVING:
            raise SystemExit("too many shipments to lost peers do not come to an end")
        for stranger in list(self._strangers):
            side, tag, request, data = stranger
            if request.completed:
                self._strangers.remove(stranger)
                if tag == HELLO | side.door_tag:
                    self._welcome(side, data)
                moved = True
        return moved

    def _settle_connection(self, connection: Connection) -> bool:
        moved = False
        while connection.shipping and done(connection.shipping[0][0]):
            connection.shipping.popleft()
            self._say(m.Shipped(connection.number))
            moved = True
        connection.others = [(r, data) for r, data in connection.others if not done([r])]
        for place, arrival in enumerate(list(connection.arrivals)):
            if arrival.envelope is None:
                if not done(arrival.requests):
                    break
                self._begin(connection, arrival)
                moved = True
            if arrival.room is None and arrival.envelope is not None and arrival.envelope.lengths:
                if place >= MAX_RECEIVING or not self._free:
                    break
                self._receive(connection, arrival, arrival.envelope)
                moved = True
        while connection.arrivals:
            arrival = connection.arrivals[0]
            envelope = arrival.envelope
            if envelope is None or (envelope.lengths and arrival.room is None):
                break
            if not done(arrival.requests):
                break
            connection.arrivals.popleft()
            room = -1 if arrival.room is None else arrival.room
            size = sum(envelope.lengths)
            self._say(m.Came(connection.number, envelope.header, room, size))
            moved = True
        return moved

    # ------------------------------------------------------------ receiving

    def _take_messages(self, side: Side) -> bool:
        """Begin to receive what is no body; whether there was anything."""
        moved = False
        while True:
            found = side.worker.tag_probe(
                self._ucx.UCXXTag(0), self._ucx.UCXXTagMask(BODY), remove=True
            )
            if not found.matched:
                return moved
            moved = True
            tag, length = found.sender_tag.value, found.length
            if length > MAX_CONTROL_BYTES:
                raise SystemExit(f"a peer sent a control message of {length} bytes")
            data = bytearray(length)
            request = side.worker.tag_recv_with_handle(self._array(data), found)
            connection = self._tags.get(tag & ~KIND_MASK)
            kind = tag & KIND_MASK
            if connection is None or connection.side is not side or kind == HELLO:
                self._strangers.append((side, tag, request, data))
            elif kind == BYE:
                self._strangers.append((side, tag, request, data))
                self._lose(connection, "the peer closed the connection")
            elif kind == ANSWER or connection.is_up:
                connection.arrivals.append(Arrival(data, [request]))
            else:
                self._strangers.append((side, tag, request, data))  # UCX still writes there

    def _begin(self, connection: Connection, arrival: Arrival) -> None:
        """Its first message is there."""
        try:
            if not connection.is_up:
                connection.arrivals.remove(arrival)
                self._establish(connection, m.decode_answer.decode(arrival.buffer))
                return
            envelope = m.decode_envelope.decode(arrival.buffer)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"bad message of a peer: {error}") from error
        if min(envelope.lengths, default=1) < 1 or sum(envelope.lengths) > self._room_bytes:
            raise ProtocolError("a data message of impossible size")
        arrival.envelope = envelope

    def _receive(self, connection: Connection, arrival: Arrival, envelope: m.Envelope) -> None:
        """Give it a room and have UCX write there."""
        arrival.room = self._free.pop()
        start = arrival.room * self._room_bytes
        tag = self._ucx.UCXXTag(BODY | envelope.tag & ~KIND_MASK)
        for length in envelope.lengths:
            target = self._array(self._rooms[start : start + length])
            arrival.requests.append(connection.side.bulk.tag_recv(target, tag))
            start += length

    # ------------------------------------------------------------ connections

    def _connect(self, number: int, address: str) -> None:
        doors = {door.way: door for door in m.doors_of(address)}
        reasons = ["no common way"]
        for side in self._sides:
            door = doors.get(side.way)
            if door is None:
                continue
            try:
                endpoint = bulk = side.endpoint(door.worker)
                if door.bulk:
                    bulk = side.bulk_endpoint(door.bulk)
            except self._ucx.UCXError as error:
                reasons.append(f"{side.way}: {error}")
                continue
            connection = self._add(number, side, endpoint, bulk)
            hello = m.Hello(bytes(side.worker.address), connection.here, os.getpid())
            self._send(connection, HELLO | door.tag, m.encode(hello))
            return
        self._say(m.Lost(number, "; ".join(reasons)))

    def _welcome(self, side: Side, data: bytearray) -> None:
        """Somebody connects."""
        try:
            hello = m.decode_hello.decode(data)
            endpoint = side.endpoint(hello.worker)
        except (msgspec.DecodeError, self._ucx.UCXError) as error:
            print(f"a peer could not connect: {error}", file=sys.stderr, flush=True)
            return
        connection = self._add(self._next_number, side, endpoint, None)
        self._next_number += 2
        self._send(connection, ANSWER | hello.tag, m.encode(m.Answer(connection.here, os.getpid())))
        try:
            self._establish(connection, m.Answer(hello.tag, hello.pid))
        except Gone as error:
            self._lose(connection, str(error))

    def _add(self, number: int, side: Side, endpoint: Any, bulk: Any) -> Connection:
        connection = Connection(number, side, endpoint, bulk, secrets.randbits(KIND_BITS))
        self._connections[number] = self._tags[connection.here] = connection
        return connection

    def _establish(self, connection: Connection, answer: m.Answer) -> None:
        """The peer is known from here on. Raises Gone, UCXError."""
        connection.there = answer.tag & ~KIND_MASK
        if connection.is_closing:
            self._send(connection, BYE | connection.there, b"x")
            raise Gone("the connection was closed before it was up")
        connection.is_up = True
        if not connection.side.handles_errors:
            try:
                connection.pidfd = os.pidfd_open(answer.pid)
            except OSError as error:
                raise Gone(f"the process of the peer cannot be watched: {error}") from error
            self._poll.register(connection.pidfd, select.POLLIN)
        self._say(m.Connected(connection.number, connection.side.way.partition("/")[0]))

    def _lose(self, connection: Connection, reason: str) -> None:
        self._remove(connection)
        self._say(m.Lost(connection.number, reason))

    def _remove(self, connection: Connection) -> None:
        del self._connections[connection.number], self._tags[connection.here]
        self._orphans += connection.arrivals
        self._leaving += connection.shipping
        self._leaving += [([request], data) for request, data in connection.others]
        if connection.pidfd >= 0:
            self._poll.unregister(connection.pidfd)
            os.close(connection.pidfd)
        endpoints = [connection.endpoint]
        if connection.bulk not in (None, connection.endpoint):
            endpoints.append(connection.bulk)
        for endpoint in endpoints:
            try:
                closing = endpoint.close()
            except self._ucx.UCXError as error:
                closing = error
            self._graves.append((endpoint, closing))
        self._count_graves()

    def _count_graves(self) -> None:
        """With those that wait for a peer to answer, who may never do so."""
        closing = sum(connection.is_closing for connection in self._connections.values())
        if len(self._graves) + closing > MAX_GRAVES:
            raise SystemExit(f"{MAX_GRAVES} endpoints are over; only an end frees their memory")

    # ------------------------------------------------------------ sending

    def _send(self, connection: Connection, tag: int, data: bytes) -> None:
        request = connection.endpoint.tag_send(self._array(data), self._ucx.UCXXTag(tag))
        connection.others.append((request, data))

    def _ship(self, connection: Connection, ship: m.Ship, fds: list[int]) -> None:
        bodies = [self._pool[offset : offset + length] for offset, length in ship.runs]
        bodies += [memoryview(mmap.mmap(fd, ship.staged, prot=mmap.PROT_READ)) for fd in fds]
        tag = secrets.randbits(KIND_BITS)
        envelope = m.Envelope(ship.header, tag, tuple(len(body) for body in bodies))
        first = memoryview(m.encode(envelope))
        parts = [(connection.endpoint, ENVELOPE | connection.there, first)]
        parts += [(connection.bulk, BODY | tag, body) for body in bodies]
        requests = [
            endpoint.tag_send(self._array(part), self._ucx.UCXXTag(part_tag))
            for endpoint, part_tag, part in parts
        ]
        connection.shipping.append((requests, parts))

    # ------------------------------------------------------------ the worker

    def _say(self, message: m.FromHelper) -> None:
        self._said_at = monotonic()
        self._link.send(m.encode(message))

    def _read_link(self) -> bool:
        moved = False
        while True:
            try:
                # Not `socket.recv_fds`, which forgets its flags.
                data, ancillary, _, _ = self._link.recvmsg(
                    m.MAX_PACKET_BYTES, socket.CMSG_LEN(FD_BYTES), socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                return moved
            fds = [int.from_bytes(fd, sys.byteorder) for _, _, fd in ancillary]
            if not data:
                os._exit(0)  # the worker is done with us; nothing here is worth a goodbye
            self._obey(m.decode_for_helper.decode(data), fds)
            for fd in fds:
                os.close(fd)
            moved = True

    def _obey(self, message: m.ToHelper, fds: list[int]) -> None:
        if isinstance(message, m.Free):
            self._free.append(message.room)
            return
        if isinstance(message, m.Connect):
            try:
                self._connect(message.number, message.address)
            except ProtocolError as error:
                self._say(m.Lost(message.number, str(error)))
            return
        connection = self._connections.get(message.number)
        if connection is None:
            return  # it was lost, and the worker does not know yet
        try:
            if isinstance(message, m.Ship):
                self._ship(connection, message, fds)
            elif connection.is_up:
                self._send(connection, BYE | connection.there, b"x")
                self._remove(connection)
            else:
                connection.is_closing = True  # its peer has no tag to be told by yet
                self._count_graves()
        except self._ucx.UCXError as error:
            self._lose(connection, str(error))


def end_with(parent: int) -> None:
    """Whatever UCX does: nothing outlives the worker."""
    watch = select.poll()
    watch.register(os.pidfd_open(parent), select.POLLIN)
    watch.poll()
    os._exit(0)


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=m.Settings)
    Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    # Read by UCX itself, and by nothing else in this process.
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    try:
        # ucxx finds UCX by itself only where RMM, which nothing here needs, is installed too.
        import_module("libucx").load_library()
    except ModuleNotFoundError:
        pass  # UCX of the system
    try:
        Helper(settings).run()
    except SystemExit as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)  # at once: the destructors of UCX may wait for a peer that is gone


if __name__ == "__main__":
    main()
