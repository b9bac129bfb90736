"""A prefill and a decode worker as real processes with a tiny real model; a bare client."""

import asyncio
import json
import random
import urllib.request
from pathlib import Path

import pytest

from common.sampling import SamplingParams
from tests.conftest import MakeCheckpoint
from tests.parity import greedy, load_reference
from tests.workers import stop, workers

pytestmark = [pytest.mark.redis, pytest.mark.system]

FLAGS = ("--kv-blocks", "64", "--max-num-batched-tokens", "48")


@pytest.fixture(scope="module")
def llama(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint("llama")


def get(url: str) -> tuple[int, str]:
    with urllib.request.urlopen(url, timeout=5) as response:
        return response.status, response.read().decode()


async def test_handover_between_processes(llama: Path) -> None:
    rng = random.Random(1)
    prompts = [rng.choices(range(3, 250), k=n) for n in (1, 15, 16, 17, 100, 200)]
    reference = load_reference(llama)
    expected = [greedy(reference, prompt, 12) for prompt in prompts]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    async with workers(llama, "prefill", "decode", flags=FLAGS) as fleet:
        remote = await asyncio.gather(*(fleet.generate(p, params) for p in prompts))
        local = await asyncio.gather(*(fleet.generate(p, params, local=True) for p in prompts))
        assert remote == local == expected

        seeded = SamplingParams(max_tokens=20, temperature=1.0, seed=5, ignore_eos=True)
        choices = (0, 1, 2)
        there = await fleet.finished(fleet.submit(prompts[4], seeded, choices=choices))
        here = await fleet.finished(fleet.submit(prompts[4], seeded, choices=choices, local=True))
        for choice in choices:
            assert there.streams[choice].tokens == here.streams[choice].tokens
        assert len({tuple(there.streams[c].tokens) for c in choices}) == 3
        assert there.streams[0].cached == 96  # the prefill worker computed this prompt before

        numbers = [fleet.submit(prompts[5], seeded) for _ in range(12)]
        await asyncio.sleep(0.01)
        for number in numbers[::2]:
            fleet.cancel(number)
        for number in numbers[1::2]:
            assert len((await fleet.finished(number)).streams[0].tokens) == 20
        for role in ("prefill", "decode"):
            await fleet.quiet(role)
            info = fleet.workers[role]
            status, text = get(info.metrics_url)
            assert status == 200 and 'tandem_kv_blocks{state="in_use"} 0.0' in text
            status, text = get(info.metrics_url.replace("/metrics", "/health"))
            assert (status, json.loads(text)) == (200, {"state": "ready"})

        # Draining: what is held is finished, what is new is refused, then both leave.
        last = fleet.submit(prompts[5], SamplingParams(max_tokens=60, seed=1, ignore_eos=True))
        await fleet.until(lambda: fleet.stream(last).tokens)
        loop = asyncio.get_running_loop()
        ends = [loop.run_in_executor(None, stop, p) for p in fleet.processes.values()]
        await fleet.until(lambda: len(fleet.leaving) >= 1)
        assert len((await fleet.finished(last)).streams[0].tokens) == 60
        for code, errors in await asyncio.gather(*ends):
            assert code == 0 and "Traceback" not in errors, errors
        await fleet.until(lambda: len(fleet.down) == 2)
        assert sorted(fleet.leaving) == sorted(
            (info.id, done) for info in fleet.workers.values() for done in (False, True)
        )
