"""The helper process of UCX, in this process and over a UCX that does as it is told."""

import itertools
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtransfer import ucx_messages as m
from kvtransfer import ucx_process
from kvtransfer.ucx_process import BURST, Helper
from kvtransfer.ucx_sides import ANSWER, BYE, ENVELOPE, HELLO, KIND_MASK, Connection

ROOM_BYTES = 4096


class Stop(Exception):
    """Ends the endless loop of a helper."""


class Request:
    def __init__(self, completed: bool) -> None:
        self.completed = completed

    def check_error(self) -> None:
        """It never fails."""


class Endpoint:
    """Sends nothing, and remembers what."""

    alive = True

    def __init__(self) -> None:
        self.sent: list[tuple[int, Request]] = []

    def tag_send(self, array: Any, tag: Any) -> Request:
        self.sent.append((tag.value, Request(False)))
        return self.sent[-1][1]

    def close(self) -> object:
        return object()

    @property
    def tags(self) -> list[int]:
        return [tag for tag, _ in self.sent]


class Worker:
    """Receives what is put into `inbox`: (tag, bytes)."""

    address = b"here"

    def __init__(self, context: object) -> None:
        self.inbox: deque[tuple[int, bytes]] = deque()
        self.is_slow = False
        """What is received now is not complete before the test says so."""
        self.received: list[Request] = []
        self.progress: Callable[[], bool] = lambda: False
        self.epoll_file_descriptor = os.eventfd(0)

    def init_blocking_progress_mode(self) -> None:
        """It is always in it."""

    def progress_once(self) -> bool:
        return self.progress()

    def tag_probe(self, tag: Any, mask: Any, remove: bool) -> Any:
        if not self.inbox:
            return SimpleNamespace(matched=False)
        number, data = self.inbox.popleft()
        sender_tag = SimpleNamespace(value=number)
        return SimpleNamespace(matched=True, sender_tag=sender_tag, length=len(data), data=data)

    def tag_recv_with_handle(self, array: Any, found: Any) -> Request:
        array.obj[:] = found.data
        self.received.append(Request(not self.is_slow))
        return self.received[-1]


def value(of: int) -> Any:
    return SimpleNamespace(value=of)


def array(of: Any) -> Any:
    return SimpleNamespace(obj=of)


def fake_ucx() -> Any:
    defaults = {"TLS": "all", "NET_DEVICES": "all", "RNDV_SCHEME": "auto"}
    return SimpleNamespace(
        UCXError=type("UCXError", (Exception,), {}),
        Feature=SimpleNamespace(TAG=1, WAKEUP=2),
        get_current_options=lambda: defaults,
        UCXContext=lambda options, features: None,
        UCXWorker=Worker,
        UCXXTag=value,
        UCXXTagMask=value,
        UCXAddress=SimpleNamespace(create_from_buffer=lambda worker: None),
        UCXEndpoint=SimpleNamespace(create_from_worker_address=lambda *arguments: Endpoint()),
    )


class Scene:
    """A helper and the worker's end of its link."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        modules = {"ucxx._lib.libucxx": fake_ucx(), "ucxx._lib.arr": SimpleNamespace(Array=array)}
        monkeypatch.setattr(ucx_process, "import_module", modules.__getitem__)
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.link.setblocking(False)
        self._fds = [os.memfd_create("pool"), os.memfd_create("rooms")]
        for fd in self._fds:
            os.ftruncate(fd, m.NUM_ROOMS * ROOM_BYTES)
        pool_fd, rooms_fd = self._fds
        settings = m.Settings(
            link_fd=theirs.detach(),
            pool_fd=pool_fd,
            pool_bytes=ROOM_BYTES,
            rooms_fd=rooms_fd,
            room_bytes=ROOM_BYTES,
            is_local=True,
        )
        self.helper = Helper(settings)
        self.worker: Worker = self.helper._sides[0].worker

    def close(self) -> None:
        self.link.close()
        self.helper._link.close()
        for fd in [
            *self._fds,
            *(w.epoll_file_descriptor for s in self.helper._sides for w in s.workers),
        ]:
            os.close(fd)

    def connect(self, number: int, bulk: bytes = b"") -> Connection:
        """To a peer that has the tag 5 for it; `bulk`: where it wants bodies, if apart."""
        door = m.Door(self.helper._sides[0].way, b"there", bulk, 5)
        self.helper._obey(m.Connect(number, m.address_of([door])), [])
        return self.helper._connections[number]

    def answer(self, connection: Connection) -> None:
        """The peer wants to be sent the tag 77."""
        answer = m.encode(m.Answer(77, os.getpid()))
        self.worker.inbox.append((ANSWER | connection.here, answer))
        self.turn()

    def turn(self) -> None:
        self.helper._take_messages(self.helper._sides[0])
        self.helper._settle()

    def said(self) -> list[m.FromHelper]:
        messages: list[m.FromHelper] = []
        while True:
            try:
                messages.append(m.decode_from_helper.decode(self.link.recv(m.MAX_PACKET_BYTES)))
            except BlockingIOError:
                return messages


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    made = Scene(monkeypatch)
    try:
        yield made
    finally:
        made.close()


def test_a_connection_that_is_closed_before_it_is_up(scene: Scene) -> None:
    """Its peer, who holds it for one that is up, is told so when it answers."""
    connection = scene.connect(0)
    scene.helper._obey(m.HangUp(0), [])
    scene.turn()
    assert connection.endpoint.tags == [HELLO | 5]
    scene.answer(connection)
    assert connection.endpoint.tags == [HELLO | 5, BYE | 77]
    assert not scene.helper._connections and not scene.helper._tags
    assert not any(isinstance(message, m.Connected) for message in scene.said())


def test_what_comes_too_early_is_received_to_its_end(scene: Scene) -> None:
    """UCX writes into memory that nothing else here knows of."""
    connection = scene.connect(0)
    scene.worker.is_slow = True
    scene.worker.inbox.append((ENVELOPE | connection.here, b"early"))
    scene.turn()
    (early,) = scene.worker.received
    assert [request for _, _, request, _ in scene.helper._strangers] == [early]
    early.completed = True
    scene.turn()
    assert not scene.helper._strangers and 0 in scene.helper._connections


def test_the_end_of_a_connection_lets_go_of_its_memory(scene: Scene) -> None:
    """As soon as UCX has read it."""
    connection = scene.connect(0)
    scene.answer(connection)
    assert scene.said() == [m.Connected(0, "sm")]
    endpoint = connection.endpoint
    staged = os.memfd_create("test-staged")
    os.ftruncate(staged, ROOM_BYTES)
    scene.helper._obey(m.Ship(0, b"header", (), ROOM_BYTES), [staged])
    os.close(staged)
    scene.helper._obey(m.HangUp(0), [])
    del connection
    assert [tag & KIND_MASK for tag in endpoint.tags[:2]] == [HELLO, ENVELOPE]
    assert endpoint.tags[-1] == BYE | 77
    scene.turn()
    assert mappings("test-staged") == 1
    for _, request in endpoint.sent:
        request.completed = True
    scene.turn()
    assert mappings("test-staged") == 0


def mappings(name: str) -> int:
    return Path("/proc/self/maps").read_text().count(f"/memfd:{name} ")


def test_a_helper_ends_before_it_has_grown_large(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a connection that was closed nor one that is never answered can be freed."""
    monkeypatch.setattr(ucx_process, "MAX_GRAVES", 2)
    for number in (0, 2):
        scene.connect(number)
        scene.helper._obey(m.HangUp(number), [])
    scene.answer(scene.connect(4))
    with pytest.raises(SystemExit, match="2 endpoints are over"):
        scene.helper._obey(m.HangUp(4), [])


def complete(*endpoints: Any) -> None:
    for endpoint in endpoints:
        for _, request in endpoint.sent:
            request.completed = True


def test_shipments_that_do_not_end_are_not_piled_up(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each keeps what it reads, and is looked at again and again."""
    monkeypatch.setattr(ucx_process, "MAX_LEAVING", 2)
    for number, fits in ((0, True), (2, False)):
        connection = scene.connect(number, bulk=b"bulk")
        scene.answer(connection)
        for _ in range(2):
            scene.helper._obey(m.Ship(number, b"header", ((0, 64),)), [])
        scene.helper._obey(m.HangUp(number), [])
        complete(connection.endpoint)
        if fits:
            scene.turn()
    with pytest.raises(SystemExit, match="too many shipments"):
        scene.turn()


def test_a_helper_is_alive_while_something_moves_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It never waits for a second then."""
    clock = itertools.count(0.0, 0.4)
    monkeypatch.setattr(ucx_process, "monotonic", lambda: next(clock))
    scene = Scene(monkeypatch)
    steps = iter(range(20 * BURST))

    def busy() -> bool:
        if next(steps, None) is None:
            raise Stop
        return True

    scene.worker.progress = busy
    try:
        with pytest.raises(Stop):
            scene.helper.run()
        ready, *others = scene.said()
        assert isinstance(ready, m.Ready)
        assert len(others) >= 5 and set(map(type, others)) == {m.Alive}
    finally:
        scene.close()
