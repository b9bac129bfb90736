"""Why a request went where it did, and what its first token took."""

import asyncio
import json
from pathlib import Path

import pytest

from common.blockhash import BlockHash
from router.explain import KEPT
from router.ladder import HashCache, Ladder
from router.request import Request
from router.tokenizer import TextModel
from tests.client import complete
from tests.router.conftest import Deploy
from tests.router.deployment import until
from tests.router.stub_worker import expected
from tests.router.test_request import request as make

PROMPT = list(range(10, 60))
PARTS = [
    "tokenise", "router_queue", "prefill_queue", "prefill", "exposed_transfer", "decode_queue",
    "first_step",
]  # fmt: skip


async def test_a_request_is_explained(deploy: Deploy, tmp_path: Path) -> None:
    log = tmp_path / "explain.jsonl"
    async with deploy(prefill=2, explain_log=log) as served:
        for worker in served.prefills:
            worker.cached_tokens = 16
        body = {"prompt": PROMPT, "max_tokens": 4}
        answer = await served.http.post("/v1/completions", json=body)
        label = answer.headers["x-request-id"]
        await until(lambda: served.service.num_live == 0)
        answer = await served.http.get(f"/v1/requests/{label}/explain")
        (shown,) = answer.json()["prompts"]
        assert shown["outcome"] == "finished"
        assert (shown["prompt_tokens"], shown["output_tokens"]) == (50, 4)
        assert shown["reused_tokens"] == {"predicted": 0, "actual": 16}
        (decision,) = shown["decisions"]
        assert decision["prefill"] in ("prefill-0", "prefill-1")
        assert decision["decode"] == "decode-0" and decision["uncached_tokens"] == 50
        assert shown["ttft_s"]["predicted"] == decision["predicted_ttft_s"] > 0
        assert shown["ttft_s"]["actual"] > 0
        candidates = {weighed["worker"]: weighed for weighed in decision["candidates"]}
        assert candidates.keys() == {"prefill-0", "prefill-1", "decode-0"}
        for weighed in candidates.values():
            assert weighed["objection"] == ""
        chosen = candidates[decision["prefill"]]
        assert chosen["wait_s"] + chosen["work"] / 4 == pytest.approx(chosen["ttft_s"])
        assert list(shown["parts_s"]) == PARTS
        for name in ("tokenise", "router_queue", "exposed_transfer", "first_step"):
            assert shown["parts_s"][name]["actual"] >= 0
        assert shown["parts_s"]["prefill"]["predicted"] > 0
        assert [json.loads(line) for line in log.read_text().splitlines()] == [shown]
        assert served.value("ttft_prediction_error_count") == 1
        assert served.value("hit_prediction_error_tokens_sum") == 16
        text = (await served.http.get("/metrics")).text
        for rung, tokens in {"infinite": 0, "capacity": 0, "routed": 0, "actual": 16}.items():
            assert f'tandem_router_prefix_ladder_tokens{{rung="{rung}"}} {tokens}.0' in text


async def test_who_may_ask(deploy: Deploy, tmp_path: Path) -> None:
    async with deploy(api_key="secret") as served:
        answer = await complete(served.http, PROMPT, max_tokens=2)
        assert answer.ids
        url = "/v1/requests/unknown/explain"
        assert (await served.http.get(url)).status_code == 404
        assert (await served.http.get(url, headers={"authorization": "x"})).status_code == 401


async def test_a_live_request_and_the_end_of_the_ring(deploy: Deploy) -> None:
    async with deploy() as served:
        served.prefills[0].gate.clear()
        asked = asyncio.create_task(
            served.http.post(
                "/v1/completions", json={"prompt": PROMPT}, headers={"x-request-id": "mine"}
            )
        )
        await until(lambda: served.service.num_live == 1)
        (shown,) = (await served.http.get("/v1/requests/mine/explain")).json()["prompts"]
        assert shown["outcome"] == "live" and shown["ttft_s"]["actual"] is None
        served.prefills[0].gate.set()
        assert (await asked).status_code == 200
        await asyncio.gather(*(complete(served.http, [7], max_tokens=1) for _ in range(KEPT)))
        assert (await served.http.get("/v1/requests/mine/explain")).status_code == 404


def other(model: TextModel, number: int) -> Request:
    one = make(model)
    one.id = -1 - number
    return one


async def test_a_live_request_is_kept_whoever_ends_meanwhile(deploy: Deploy) -> None:
    async with deploy(prefill=0, decode=1) as served:
        served.decodes[0].ends_at = 2
        headers = {"x-request-id": "team/a:1"}
        body = {"prompt": PROMPT}
        asked = asyncio.create_task(served.http.post("/v1/completions", json=body, headers=headers))
        explainer = served.service.explainer
        await until(lambda: any(trace.first for trace in explainer.find("team/a:1", "")))
        for number in range(KEPT):
            one = other(served.text_model, number)
            explainer.submitted(one)
            explainer.ended(one, "cancelled")
        (shown,) = (await served.http.get("/v1/requests/team/a:1/explain")).json()["prompts"]
        assert shown["outcome"] == "live" and shown["ttft_s"]["actual"] > 0
        served.decodes[0].go_on()
        assert (await asked).status_code == 200
        await until(lambda: served.service.num_live == 0)
        (shown,) = (await served.http.get("/v1/requests/team/a:1/explain")).json()["prompts"]
        assert (shown["outcome"], shown["output_tokens"]) == ("finished", 16)


async def test_a_full_disk_ends_the_log_and_nothing_else(
    deploy: Deploy, caplog: pytest.LogCaptureFixture
) -> None:
    async with deploy(explain_log=Path("/dev/full")) as served:
        for seed in range(2):
            answer = await complete(served.http, PROMPT, seed=seed)
            assert answer.ids == expected(PROMPT, 16, seed=seed)
        await until(lambda: served.service.num_live == 0)
        said = [message for message in caplog.messages if "no more requests are logged" in message]
        assert len(said) == 1 and said[0].startswith("/dev/full: ")
        served.service.explainer.close()


def hashes(*names: int) -> list[BlockHash]:
    return [BlockHash(bytes([name] * 16)) for name in names]


def test_the_cache_of_hashes_forgets_tails_first() -> None:
    cache = HashCache()
    assert cache.use(hashes(1, 2, 3), 4) == 0
    assert cache.use(hashes(1, 2, 4), 4) == 2
    assert cache.use(hashes(1, 2, 5), 4) == 2  # evicts the 3
    assert cache.use(hashes(1, 2, 3), 4) == 2
    assert len(cache) == 4


def test_the_rungs_of_the_ladder() -> None:
    ladder = Ladder()
    for chain in (hashes(1, 2), hashes(3, 4), hashes(1, 2)):
        ladder.arrived(chain, 16, 32, capacity=2, best=16)
    ladder.reused(16)
    # All of a prompt may be held, but one token is computed.
    assert ladder.tokens == {"infinite": 31, "capacity": 0, "routed": 48, "actual": 16}
    assert ladder.prompt_tokens == 96
