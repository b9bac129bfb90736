"""One rival library between two processes; run by the Python of its own virtual environment.

    PYTHON transfer_rival.py nixl|mooncake BLOCK_BYTES NUM_BLOCKS SECONDS SIZE,SIZE,...

Uses nothing of Tandem. Writes one JSON object per size: blocks, gbps (up to 4 transfers in
flight), us_p50 (one alone), cpu_s_per_gb (both processes). Blocks of a transfer are contiguous and
handed over as one range, which is what suits these libraries best.
"""

import base64
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import numpy as np

IN_FLIGHT = 4
POLL_S = 20e-6
"""Between two looks at a transfer: without it the library's poll keeps a core from its peer."""


def make_pool(num_bytes: int) -> Any:
    return np.ones(num_bytes, np.uint8)


# ------------------------------------------------------------ nixl: UCX, DRAM, write


def nixl_agent(name: str, pool: Any) -> Any:
    api = import_module("nixl._api")
    agent = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False))
    agent.register_memory([(pool.ctypes.data, pool.nbytes, 0, "")], "DRAM")
    return agent


def nixl_serve(pool: Any) -> None:
    agent = nixl_agent("target", pool)
    say([base64.b64encode(agent.get_agent_metadata()).decode(), pool.ctypes.data])
    while True:
        agent.get_new_notifs()  # nothing moves unless the target looks
        time.sleep(POLL_S)


class Nixl:
    def __init__(self, pool: Any, hello: Any) -> None:
        self._agent = nixl_agent("initiator", pool)
        metadata, self._there = base64.b64decode(hello[0]), hello[1]
        self._peer = self._agent.add_remote_agent(metadata)
        self._here = pool.ctypes.data

    def prepare(self, offsets: list[int], num_bytes: int) -> list[Any]:
        handles = []
        for offset in offsets:
            here = self._agent.get_xfer_descs([(self._here + offset, num_bytes, 0)], "DRAM")
            there = self._agent.get_xfer_descs([(self._there + offset, num_bytes, 0)], "DRAM")
            handles.append(self._agent.initialize_xfer("WRITE", here, there, self._peer))
        return handles

    def run(self, handles: list[Any], count: int) -> None:
        """Start `count` transfers, round-robin, and wait until all are over."""
        active: list[Any] = []
        started = 0
        while started < count or active:
            while started < count and len(active) < len(handles):
                handle = handles[started % len(handles)]
                self._check(self._agent.transfer(handle))
                active.append(handle)
                started += 1
            before = len(active)
            # In order, so that a handle is over before its next turn.
            while active and self._check(self._agent.check_xfer_state(active[0])) == "DONE":
                active.pop(0)
            if len(active) == before:
                time.sleep(POLL_S)

    def _check(self, state: str) -> str:
        if state == "ERR":
            raise SystemExit("nixl: a transfer failed")
        return state


# ------------------------------------------------------------ mooncake: TCP, write


def mooncake_engine(pool: Any) -> Any:
    engine = import_module("mooncake.engine").TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise SystemExit("mooncake: cannot initialize")
    if engine.register_memory(pool.ctypes.data, pool.nbytes):
        raise SystemExit("mooncake: cannot register memory")
    return engine


def mooncake_serve(pool: Any) -> None:
    engine = mooncake_engine(pool)
    say([f"127.0.0.1:{engine.get_rpc_port()}", pool.ctypes.data])
    sys.stdin.read()


class Mooncake:
    def __init__(self, pool: Any, hello: Any) -> None:
        self._engine = mooncake_engine(pool)
        self._target, self._there = hello
        self._here = pool.ctypes.data
        self._threads = ThreadPoolExecutor(IN_FLIGHT)

    def prepare(self, offsets: list[int], num_bytes: int) -> list[Any]:
        return [(self._here + at, self._there + at, num_bytes) for at in offsets]

    def run(self, handles: list[Any], count: int) -> None:
        if count == 1:
            self._write(handles[0])
            return
        turns = [handles[i % len(handles)] for i in range(count)]
        for _ in self._threads.map(self._write, turns):
            pass

    def _write(self, handle: Any) -> None:
        if self._engine.transfer_sync_write(self._target, *handle):
            raise SystemExit("mooncake: a transfer failed")


# ------------------------------------------------------------ both


def say(words: Any) -> None:
    print("HELLO " + json.dumps(words), flush=True)


def cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return time.process_time() + (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def measure(
    rival: Any, pid: int, block_bytes: int, num_blocks: int, seconds: float, sizes: list[int]
) -> Iterator[dict[str, Any]]:
    for blocks in sizes:
        num_bytes = blocks * block_bytes
        groups = min(IN_FLIGHT, num_blocks // blocks)
        handles = rival.prepare([group * num_bytes for group in range(groups)], num_bytes)
        rival.run(handles, groups)
        alone: list[float] = []
        ends = time.perf_counter() + seconds
        while not alone or (len(alone) < 64 and time.perf_counter() < ends):
            started = time.perf_counter()
            rival.run(handles, 1)
            alone.append(time.perf_counter() - started)
        count = max(groups, min(4096, int(seconds / statistics.median(alone))))
        cpu, started = cpu_s(pid), time.perf_counter()
        rival.run(handles, count)
        gigabytes = count * num_bytes / 1e9
        yield {
            "blocks": blocks,
            "gbps": round(gigabytes / (time.perf_counter() - started), 3),
            "us_p50": round(statistics.median(alone) * 1e6, 1),
            "cpu_s_per_gb": round((cpu_s(pid) - cpu) / gigabytes, 4),
        }


def main() -> None:
    library, block_bytes, num_blocks, seconds, sizes = sys.argv[1:6]
    pool = make_pool(int(block_bytes) * int(num_blocks))
    if sys.argv[6:] == ["serve"]:
        (nixl_serve if library == "nixl" else mooncake_serve)(pool)
    command = [sys.executable, *sys.argv, "serve"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        lines = (line for line in server.stdout if line.startswith("HELLO "))
        hello = json.loads(next(lines).removeprefix("HELLO "))
        rival = (Nixl if library == "nixl" else Mooncake)(pool, hello)
        wanted = [int(size) for size in sizes.split(",")]
        rows = measure(rival, server.pid, int(block_bytes), int(num_blocks), float(seconds), wanted)
        for row in rows:
            print(json.dumps(row), flush=True)
    finally:
        server.kill()
        server.wait()
    os._exit(0)  # their threads may not end


if __name__ == "__main__":
    main()
