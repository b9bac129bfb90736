"""A worker process with a link and nothing else: prints its address, answers every Ping.

Run as `python -m tests.common.echo_worker`, to be killed and stopped by the tests of the link.
"""

import asyncio
import time

import msgspec

from common.config import TimerConfig
from common.link import WorkerLink
from common.messages import Load, Ping, Pong
from tests.worker_info import worker_info


async def serve() -> None:
    link = WorkerLink("127.0.0.1", TimerConfig())
    await link.start()
    info = msgspec.structs.replace(worker_info("echo"), epoch=time.time_ns(), address=link.address)
    link.set_info(info)
    print(link.address, flush=True)
    while True:
        router, message = await link.receive()
        if isinstance(message, Ping):
            link.send(router, Pong(seq=message.seq, epoch=info.epoch, steps=0, load=Load()))


if __name__ == "__main__":
    asyncio.run(serve())
