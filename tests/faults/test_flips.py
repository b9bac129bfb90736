"""Bits that flip on the way (F11): every one is noticed, whatever it hits, and no token is wrong.

Between header and copy for shm, anywhere in the byte stream (blocks, headers, framing) for tcp and
zmq. Control messages have no digest of their own and are not harmed here: TCP's checksum covers
them on every transport, and CURVE authenticates them where links are encrypted.
"""

import asyncio

from tests.faults.fleet import fleet
from tests.faults.invariants import Baseline, check
from tests.faults.volume import Volume

FLIPS = 10_000
FLIP = {"shm": 0.15, "tcp": 0.15, "zmq": 0.15}
"""A transfer has three rounds: with more of them hardly one would succeed."""
AT_ONCE = 16


async def test_flipped_bits(way: str, volume: Volume) -> None:
    wanted = volume.of(FLIPS // 3 + 1)
    async with fleet(way, seed=4) as workers:
        prefill = await workers.birth("prefill", num_blocks=256)
        decode = await workers.birth("decode", num_blocks=256, flip=FLIP[way])
        await workers.meet(prefill, decode)
        await workers.serve(20)
        baseline = Baseline(prefill, decode)
        counters: dict[str, float] = {}

        async def client() -> None:
            while counters.get("injected.flipped", 0) < wanted:
                await workers.finished(workers.submit(workers.some_prompt(), 3))

        clients = [asyncio.create_task(client()) for _ in range(AT_ONCE)]
        while counters.get("injected.flipped", 0) < wanted:
            counters = await workers.counters(decode)
            assert not workers.errors, workers.story()
            await asyncio.sleep(0.05)
        await asyncio.gather(*clients)
        counters = await workers.counters(decode)
        flipped, found = counters["injected.flipped"], counters["digest_errors"]
        if way == "shm":
            assert flipped == found  # every one hit a block
        else:
            assert found >= flipped / 3
        await baseline.check()
        await check(workers, {"flips": (flipped, wanted)})
