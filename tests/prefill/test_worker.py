"""Prefill and decode processes that are killed and paused; the survivor holds nothing back."""

import asyncio
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.sampling import SamplingParams
from tests.conftest import MakeCheckpoint
from tests.workers import workers

pytestmark = [pytest.mark.redis, pytest.mark.system]

FLAGS = (
    *("--kv-blocks", "200", "--max-num-batched-tokens", "16"),
    *("--heartbeat-s", "0.2", "--lease-s", "1", "--stall-s", "1"),
)
LONG = SamplingParams(max_tokens=300, seed=1, ignore_eos=True)


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 250), k=length)


@pytest.fixture(scope="module")
def llama(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint("llama")


async def test_paused_and_killed_workers(llama: Path) -> None:
    async with workers(llama, "prefill", "decode", flags=FLAGS) as fleet:
        prefill, decode = fleet.processes["prefill"], fleet.processes["decode"]
        short = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
        expected = await fleet.generate(prompt_of(100, 1), short)

        # Paused past the lease: a new life that holds nothing, known to everybody.
        numbers = [fleet.submit(prompt_of(500, seed), LONG) for seed in range(3)]
        await fleet.until(lambda: fleet.stream(numbers[0]).tokens)
        epoch = fleet.workers["prefill"].epoch
        prefill.send_signal(signal.SIGSTOP)
        await asyncio.sleep(2.5)
        prefill.send_signal(signal.SIGCONT)
        await fleet.until(lambda: fleet.workers["prefill"].epoch != epoch)
        for number in numbers:
            fleet.cancel(number)
        await fleet.quiet("prefill")
        await fleet.quiet("decode")
        assert await fleet.generate(prompt_of(100, 1), short) == expected

        # The prefill worker dies with prompts half shipped: the decode worker says so.
        numbers = [fleet.submit(prompt_of(900, seed), LONG) for seed in range(10, 13)]
        while not (await fleet.ledger("decode")).receiving:
            pass
        prefill.kill()
        assert (await fleet.finished(numbers[0])).failed == "peer"
        for number in numbers:  # of the others it may not have heard; the router sees the death
            fleet.cancel(number)
        await fleet.quiet("decode")
        assert await fleet.generate(prompt_of(100, 1), short, local=True) == expected
        assert decode.poll() is None


async def test_prefill_worker_outlives_its_decode_worker(llama: Path) -> None:
    async with workers(llama, "prefill", "decode", flags=FLAGS) as fleet:
        numbers = [fleet.submit(prompt_of(600, seed), LONG) for seed in range(3)]
        await fleet.until(lambda: fleet.stream(numbers[0]).tokens)
        fleet.processes["decode"].kill()
        failed = [(await fleet.finished(number)).failed for number in numbers[1:]]
        assert set(failed) <= {"peer", "transfer"}
        assert (await fleet.quiet("prefill")).leased == 0


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    run = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys; from common.config import WorkerConfig as C; from common.errors import *\n"
            "from prefill.worker import main\n"
            "try: main(C(model=sys.argv[1], redis='redis://127.0.0.1:1'))\n"
            "except ConfigError as error: sys.exit(str(error))",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 1
    assert len(run.stderr.splitlines()) == 1 and str(tmp_path) in run.stderr, run.stderr
