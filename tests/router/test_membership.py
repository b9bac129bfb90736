"""Workers of another model or dtype: which are let in, and what is never mixed."""

import asyncio
from pathlib import Path

import pytest
from numpy import zeros
from safetensors.numpy import save_file

from common.identity import content_id
from common.messages import Admit
from router.membership import Membership, content_ids
from tests.client import stream
from tests.router.conftest import Deploy
from tests.router.deployment import until
from tests.router.stub_worker import expected
from tests.router.test_recovery import PROMPT, carrier, idle
from tests.worker_info import worker_info


def test_workers_of_the_same_weights_in_any_form_are_let_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": zeros(4)}, tmp_path / "model.safetensors")
    ours = content_ids(tmp_path)
    assert ours == {
        content_id(tmp_path, dtype, quantization)
        for dtype in ("bfloat16", "float16", "float32")
        for quantization in ("none", "int8", "int4", "w8a8")
    }
    membership = Membership("t0", ours)
    for one in ours:
        assert membership.admits(worker_info(content_id=one))
    stranger = worker_info("stranger", content_id="c1", model="other")
    assert not membership.admits(stranger) and not membership.admits(stranger)
    assert not membership.admits(worker_info(content_id=min(ours), text_id="t1"))
    assert caplog.messages == [
        "worker stranger is ignored: its weights (other) differ from the router's model",
        "worker decode-0 is ignored: its tokenizer files differ from the router's",
    ]


def test_without_weights_any_are_let_in(tmp_path: Path) -> None:
    assert content_ids(tmp_path) == frozenset()
    # As a download of the small files leaves it: an index, and no shard.
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors"}}')
    assert content_ids(tmp_path) == frozenset()
    assert Membership("t0", frozenset()).admits(worker_info(content_id="c7"))


async def test_worker_with_other_weights_is_ignored(
    deploy: Deploy, caplog: pytest.LogCaptureFixture
) -> None:
    async with deploy(content_ids=frozenset({"c0"})) as served:
        stranger = await served.start("decode", "stranger", content_id="c1")
        await until(lambda: "worker stranger is ignored: its weights" in caplog.text)
        for seed in range(8):
            answer = await stream(served.http, PROMPT, seed=seed)
            assert answer.ids == expected(PROMPT, 16, seed=seed)
        assert "stranger" not in served.service.fleet and stranger.seen == []


async def test_request_is_never_continued_by_another_content(deploy: Deploy) -> None:
    async with deploy(prefill=0) as served:
        ours = served.decodes[0]
        ours.ends_at = 5
        asked = asyncio.create_task(stream(served.http, PROMPT, seed=5))
        await until(lambda: ours.steps == 5)
        assert carrier(served.decodes) is ours
        other = await served.add("decode", "other", content_id="c1")
        await ours.kill()
        await until(lambda: served.value("waiting_requests") == 1)
        # A new request may begin there.
        assert (await stream(served.http, PROMPT, seed=6)).ids == expected(PROMPT, 16, seed=6)
        await served.add("decode", "same")
        assert (await asked).ids == expected(PROMPT, 16, seed=5)
        assert len(other.received(Admit)) == 1
        await idle(served)
