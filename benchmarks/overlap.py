"""Does shipping hide behind computing? `python -m benchmarks.overlap [--json FILE] [--quick]`.

A prefill and a decode worker, two processes that compute on one thread each; this process is their
router. What is measured:

gap: from token 1, which the prefill worker sends, to token 2, which the decode worker sends, beside
the time between the later tokens of the stream (ITL); with the decode worker idle, at 80 % of the
tokens per second that it can write, and saturated.
held: the share of a prompt's blocks that the decode worker has when the last chunk starts, and how
long after that until it has 70 % of them.
prefill: from the start of the first chunk to the end of the last one, with and without shipping, in
turns.
steps: of the decode worker, with and without blocks coming in, in turns: those of the prompts that
the prefill worker computes meanwhile (which it does in both turns), and as fast as they are taken
from a process that does nothing else.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic
from typing import Any, Final

import msgspec

from benchmarks import machine
from benchmarks.compare.checkpoints import checkpoint
from benchmarks.overlap_client import Client, Flood, Plan
from benchmarks.overlap_figures import Measured, Turn, figures, report
from benchmarks.overlap_worker import Diary
from common.config import TRANSPORTS, TimerConfig
from common.link import RouterLink, Up
from common.messages import WorkerInfo

SHAPE: Final = "qwen2-0.5b"
PACED: Final = 0.8
"""Of the tokens per second of a saturated decode worker."""


class Worker:
    """A process of `benchmarks.overlap_worker`."""

    def __init__(self, plan: Plan, role: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.overlap_worker", str(os.getpid()), role,
             str(plan.model), str(plan.chunk_tokens), str(plan.kv_blocks), plan.transport],
            cwd=machine.ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip

    def info(self) -> WorkerInfo:
        """Once it is up. Raises ConnectionError if it ends instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConnectionError(f"a worker ended with code {self._process.wait()}")
        return msgspec.json.decode(line, type=WorkerInfo)

    def end(self) -> Diary:
        """Raises ConnectionError if it failed."""
        self._process.terminate()
        output, _ = self._process.communicate()
        if self._process.returncode != 0:
            raise ConnectionError(f"a worker ended with code {self._process.returncode}")
        return msgspec.json.decode(output.splitlines()[-1], type=Diary)

    def close(self) -> None:
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


async def drive(plan: Plan, client: Client) -> Measured:
    """Every load, in turns."""
    done = Measured()
    for stream in (client.prefill(), client.serve(), client.serve()):  # pages, connections
        await client.finished(stream)
    for _ in range(plan.repeats):
        done.alone.append(await client.finished(client.prefill()))
        done.idle.append(await client.finished(client.serve()))
    async with client.busy():
        await asyncio.sleep(plan.turn_s / 2)
    saturated = client.rates[-1]
    async with client.busy():
        for _ in range(plan.repeats):
            done.busy.append(await client.finished(client.serve()))
    done.paced_rate = PACED
    async with client.paced(PACED * saturated):
        for _ in range(plan.repeats):
            done.paced.append(await client.finished(client.serve()))
    for _ in range(plan.turns):
        async with client.busy():
            done.unshipped.append(await prompts(plan, client, ship=False))
            done.shipped.append(await prompts(plan, client, ship=True))
    flood = Flood(plan, client)
    await flood.start()
    try:
        await flood.run(0.1)
        for _ in range(plan.turns):
            async with client.busy():
                begin = monotonic()
                await asyncio.sleep(plan.turn_s)
                middle = monotonic()
                gbps = await flood.run(plan.turn_s)
                done.quiet.append(Turn(begin, middle, 0.0))
                done.flooded.append(Turn(middle, monotonic(), gbps))
    finally:
        await flood.close()
    return done


async def prompts(plan: Plan, client: Client, ship: bool) -> Turn:
    """The prefill worker computes one prompt after the other. With `ship` the decode worker adds
    one token to each."""
    begin = monotonic()
    count = 0
    while monotonic() < begin + plan.turn_s:
        await client.finished(client.serve(2) if ship else client.prefill())
        count += 1
    end = monotonic()
    layout = client.workers["decode"].layout
    num_bytes = count * plan.prompt_tokens * layout.token_bytes * ship
    return Turn(begin, end, num_bytes / (end - begin) / 1e9)


async def measure(plan: Plan) -> dict[str, Any]:
    """The figures. Raises ConnectionError if a worker is lost or gives a request up."""
    async with AsyncExitStack() as closing:
        workers = {role: Worker(plan, role) for role in ("prefill", "decode")}
        for worker in workers.values():
            closing.callback(worker.close)
        infos = {role: worker.info() for role, worker in workers.items()}
        link = RouterLink("overlap", TimerConfig())
        closing.push_async_callback(link.close)
        for info in infos.values():
            link.connect(info)
        for _ in infos:
            assert isinstance(await link.receive(), Up)
        client = Client(plan, link, infos)
        reading = asyncio.create_task(client.read())
        driving = asyncio.create_task(drive(plan, client))
        try:
            await asyncio.wait([reading, driving], return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
            done = await driving
        finally:
            for task in (reading, driving):
                task.cancel()
            await asyncio.gather(reading, driving, return_exceptions=True)
        diaries = {role: worker.end() for role, worker in workers.items()}
    return figures(done, diaries["prefill"], diaries["decode"], plan.streams)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure how much of shipping computing hides.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, shorter turns")
    parser.add_argument("--model", type=Path, metavar="DIR", help=f"checkpoint (random {SHAPE})")
    parser.add_argument("--transport", default="auto", choices=TRANSPORTS)
    arguments = parser.parse_args()
    plan = Plan(arguments.model or checkpoint(SHAPE), arguments.transport)
    if arguments.quick:
        plan = Plan(plan.model, plan.transport, repeats=1, turns=1, turn_s=4.0)
    busy_share = machine.busy_share()
    if busy_share > 0.1:
        print(f"The machine is {busy_share:.0%} busy already: the figures are doubtful.")
    try:
        found = asyncio.run(measure(plan))
    except ConnectionError as error:
        print(f"overlap: error: {error}", file=sys.stderr)
        return 1
    print(report(found))
    if arguments.json is not None:
        document = machine.provenance() | {"busy_share": round(busy_share, 3)} | found
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
