"""What `tandem doctor` finds out about transfers: here, and between the workers of a namespace."""

import asyncio
import re
import time
import urllib.request
from typing import Final

import redis
import zmq.asyncio

from common.config import TimerConfig
from common.curve import Caller
from common.errors import ProtocolError
from common.kv.shared import SharedBlocks
from common.messages import KvLayoutInfo, Peer, WorkerInfo
from common.records import Keys, decode_info
from kvtransfer import protocol
from kvtransfer.commands import (
    BlockRef,
    Broken,
    Close,
    Delivered,
    First,
    Grant,
    Key,
    Offer,
    Open,
    Slot,
    Wanted,
)
from kvtransfer.endpoint import Endpoint, TransferEvent
from kvtransfer.identity import EndpointIdentity
from kvtransfer.sockets import make_dealer
from kvtransfer.transport import Listener
from kvtransfer.transports import connect
from kvtransfer.ucx_transport import UcxListener, is_installed

LAYOUT: Final = KvLayoutInfo(
    block_size=16, num_layers=32, num_kv_heads=4, head_dim=32, dtype="bfloat16"
)
BLOCKS: Final = 64
TIMES: Final = 3
ANSWER_S: Final = 5.0
LIMIT_S: Final = 60.0
TIMERS: Final = TimerConfig(heartbeat_s=5.0, lease_s=30.0, stall_s=20.0)


class Pool:
    """`BlockMemory` of its own."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.shared = SharedBlocks(num_blocks, block_bytes)

    def slab(self, block: int) -> memoryview:
        return self.run(block, 1)

    def run(self, block: int, count: int) -> memoryview:
        return self.shared.blocks[block * self.block_bytes : (block + count) * self.block_bytes]


class Inbox:
    """The queue of an engine that lives in the same loop."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[TransferEvent] = asyncio.Queue()

    def put(self, item: TransferEvent, /) -> None:
        self.events.put_nowait(item)


def block_bytes(layout: KvLayoutInfo) -> int:
    width = 4 if layout.dtype == "float32" else 2
    heads = layout.num_kv_heads * layout.head_dim
    return 2 * layout.num_layers * heads * layout.block_size * width


async def measure(transport: str, host: str) -> float:
    """Bytes per second of the best of TIMES transfers between two endpoints of this process.
    Raises ConfigError, OSError, TimeoutError."""
    pools = [Pool(BLOCKS, block_bytes(LAYOUT)) for _ in range(2)]
    inboxes = [Inbox(), Inbox()]
    sender, receiver = [
        Endpoint(EndpointIdentity(id, 1, "doctor", LAYOUT), pool, inbox, TIMERS, host, transport)
        for id, pool, inbox in zip(("doctor-p", "doctor-d"), pools, inboxes, strict=True)
    ]
    try:
        async with asyncio.timeout(LIMIT_S):
            await sender.start()
            await receiver.start()
            peer = Peer("doctor-d", 1, receiver.address)
            seconds = [
                await _transfer(Key(1, turn), sender, receiver, peer, inboxes)
                for turn in range(TIMES)
            ]
    finally:
        for endpoint in (sender, receiver):
            if endpoint.address:
                await endpoint.close()
    return BLOCKS * block_bytes(LAYOUT) / min(seconds)


async def _transfer(
    key: Key, sender: Endpoint, receiver: Endpoint, peer: Peer, inboxes: list[Inbox]
) -> float:
    """Seconds from Open to Delivered. Raises OSError."""
    started = time.perf_counter()
    sender.command(Open(key, peer, BLOCKS * LAYOUT.block_size))
    blocks = tuple(BlockRef(i, i, LAYOUT.block_size) for i in range(BLOCKS))
    sender.command(Offer(key, blocks))
    sender.command(Close(key, (First(0, 1, None),)))
    granted = asyncio.ensure_future(_grant(receiver, inboxes[1]))
    try:
        while True:
            event = await inboxes[0].events.get()
            if isinstance(event, Delivered):
                return time.perf_counter() - started
            if isinstance(event, Broken):
                raise OSError(f"{event.reason}: {event.detail}")
    finally:
        granted.cancel()


async def _grant(receiver: Endpoint, inbox: Inbox) -> None:
    while True:
        event = await inbox.events.get()
        if isinstance(event, Wanted):
            receiver.command(Grant(event.key, tuple(Slot(i, i, 1) for i in range(BLOCKS))))


# ------------------------------------------------------------ a deployment that runs


def registered(url: str, namespace: str) -> tuple[list[WorkerInfo], list[str]]:
    """The workers of a namespace, and what is wrong with the others' entries. Redis answers."""
    keys = Keys(namespace)
    workers, wrong = [], []
    with redis.Redis.from_url(url, socket_timeout=ANSWER_S) as client:
        for member in sorted(client.smembers(keys.workers)):
            id = member.decode()
            fields = client.hgetall(keys.worker(id))
            if not fields:
                continue  # its lease is over
            try:
                workers.append(decode_info(fields))
            except ProtocolError as error:
                wrong.append(f"{id}: {error}")
    return workers, wrong


def rates(info: WorkerInfo) -> str:
    """What a worker has measured of its own transfers, by transport, from its /metrics. Raises
    OSError."""
    with urllib.request.urlopen(info.metrics_url, timeout=ANSWER_S) as answer:
        text = answer.read().decode()
    found: dict[tuple[str, str], float] = {}
    for line in text.splitlines():
        match = re.fullmatch(r"tandem_transfer\{(.*)\} (\S+)", line)
        if match is not None:
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[1]))
            found[labels["counter"], labels["reason"]] = float(match[2])
    parts = []
    for (counter, transport), value in sorted(found.items()):
        if counter == "links_over" and value:
            parts.append(f"sends over {transport} to {value:.0f}")
        seconds = found.get(("seconds_receiving_over", transport), 0.0)
        if counter == "bytes_received_over" and seconds:
            parts.append(f"received {value / seconds / 1e9:.2f} GB/s over {transport}")
    return ", ".join(parts)


async def reach(sender: WorkerInfo, receiver: WorkerInfo, host: str) -> dict[str, str]:
    """Introduces this process to a receiver as a sender with the layout of `sender`, and tries
    each transport that it offers: why it does not work, or nothing.

    Raises OSError, ConfigError, TimeoutError.
    """
    memory = Pool(1, block_bytes(sender.layout))
    identity = EndpointIdentity("doctor", 1, sender.content_id, sender.layout)
    context = zmq.asyncio.Context()
    dealer = make_dealer(context)
    listeners: dict[str, Listener] = {}
    try:
        dealer.connect(receiver.kv_address)
        names = ("shm", "tcp", "zmq", *(["ucx"] if is_installed() else []))
        hello = identity.hello(f"tcp://{host}:1", names)
        async with asyncio.timeout(ANSWER_S):
            await dealer.send(protocol.encode(hello))
            answer = protocol.decode_for_sender(await dealer.recv())
        if not isinstance(answer, protocol.Welcome):
            raise OSError(f"{answer}")
        ways = {name: "" for name in answer.data}
        if "ucx" in answer.data:
            listeners["ucx"] = await UcxListener.listen(host, memory)
        for name in names:
            if name in answer.data:
                caller = Caller(None, receiver.curve_key)
                outlet, ways[name] = await connect(
                    [name], answer.data, context, memory, sender.layout.block_size, ANSWER_S,
                    caller, listeners,
                )  # fmt: skip
                if outlet is not None:
                    outlet.close()
        return ways
    except (zmq.ZMQError, ProtocolError) as error:
        raise OSError(str(error)) from error
    finally:
        for listener in listeners.values():
            listener.close()
        dealer.close(linger=0)
        context.term()
