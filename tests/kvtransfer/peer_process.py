"""A worker in a process of its own, to be stopped and killed by tests.

    python -m tests.kvtransfer.peer_process TRANSPORT receiver ID EPOCH
        grants every prompt all its blocks; first line of output: its address
    python -m tests.kvtransfer.peer_process TRANSPORT sender ID EPOCH TARGET_ID TARGET_EPOCH ADDRESS
        opens a transfer of two blocks and offers the first; a line of input: offer the second,
        close

Each event is a line of output, by the name of its class and its reason.
"""

import asyncio
import sys

from common.config import TimerConfig
from common.messages import Peer
from kvtransfer.commands import Key, Wanted
from kvtransfer.endpoint import TransferEvent
from tests.kvtransfer.node import Node
from tests.kvtransfer.pool import BLOCK_SIZE

TIMERS = TimerConfig(heartbeat_s=0.4, dead_after=3, lease_s=1.0, stall_s=1.0)
KEY = Key(1, 1)


def say(line: str) -> None:
    print(line, flush=True)


async def receive(transport: str, id: str, epoch: int) -> None:
    node = Node(id, epoch, timers=TIMERS, transport=transport)
    await node.endpoint.start()
    say(node.endpoint.address)
    while True:
        event = await node.events.next(object, timeout_s=60)
        if isinstance(event, Wanted):
            blocks = -(-event.num_tokens // BLOCK_SIZE)
            node.grant(event.key, {i: i for i in range(blocks)})
        say(describe(event))


async def send(transport: str, id: str, epoch: int, target: Peer) -> None:
    node = Node(id, epoch, timers=TIMERS, transport=transport)
    for block in (0, 1):
        node.pool.fill(block, f"old {block}")
    await node.endpoint.start()
    node.open(KEY, target, 2 * BLOCK_SIZE)
    node.offer(KEY, [0])
    asyncio.get_running_loop().add_reader(sys.stdin, go_on, node)
    for step in range(10_000):
        node.endpoint.set_progress(step)
        if not node.events.empty():
            say(describe(await node.events.next(object)))
        await asyncio.sleep(0.02)


def go_on(node: Node) -> None:
    if sys.stdin.readline():
        node.offer(KEY, [1], start=1)
        node.finish(KEY)


def describe(event: TransferEvent | object) -> str:
    return f"{type(event).__name__} {getattr(event, 'reason', '')}".strip()


if __name__ == "__main__":
    transport, role, id, epoch, *target = sys.argv[1:]
    if role == "receiver":
        asyncio.run(receive(transport, id, int(epoch)))
    else:
        asyncio.run(send(transport, id, int(epoch), Peer(target[0], int(target[1]), target[2])))
