"""The parts of rivals that are ours: vLLM's proxy, the server around transformers."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks.client import Record, Target, connect, send
from benchmarks.compare.transformers_server import Batcher, Server
from benchmarks.compare.vllm_proxy import REMOTE_DECODE, Proxy
from tests.conftest import MakeCheckpoint

STREAM = b'data: {"choices": [{"index": 0, "text": "a"}]}\n\ndata: [DONE]\n\n'


def rival(seen: list[dict[str, Any]], answer: bytes, status: int = 200) -> TestServer:
    async def complete(request: web.Request) -> web.Response:
        seen.append(msgspec.json.decode(await request.read()))
        return web.Response(status=status, body=answer, content_type="text/event-stream")

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/health", health)
    return TestServer(app)


async def ask(base: str, tokens: list[int], output_len: int) -> Record:
    target = Target(f"{base}/v1/completions", "model", {}, {}, 30.0)
    async with connect() as session:
        return await send(session, target, target.body(tokens, output_len), Record(due=0.0))


async def test_proxy_sends_the_prompt_to_prefill_and_the_place_of_its_blocks_to_decode() -> None:
    prompts: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    place = {"remote_engine_id": "p", "remote_block_ids": [[1, 2]]}
    async with (
        rival(prompts, msgspec.json.encode({"kv_transfer_params": place})) as prefill,
        rival(answers, STREAM) as decode,
        TestServer(
            Proxy(str(prefill.make_url("")), str(decode.make_url("")).rstrip("/")).app()
        ) as proxy,
    ):
        record = await ask(str(proxy.make_url("")).rstrip("/"), [5, 6], 9)
        async with aiohttp.ClientSession() as session:
            async with session.get(proxy.make_url("/health")) as response:
                assert response.status == 200
            await decode.close()
            async with session.get(proxy.make_url("/health")) as response:
                assert response.status == 503
    assert (record.error, len(record.chunks)) == ("", 1)
    (first,), (second,) = prompts, answers
    assert (first["max_tokens"], first["stream"], "stream_options" in first) == (1, False, False)
    assert first["kv_transfer_params"] == REMOTE_DECODE
    assert (second["max_tokens"], second["stream"]) == (9, True)
    assert second["kv_transfer_params"] == place
    assert first["prompt"] == second["prompt"] == [5, 6]


async def test_proxy_passes_a_refusal_on() -> None:
    async with (
        rival([], b"too long", status=400) as prefill,
        TestServer(Proxy(str(prefill.make_url("")), "http://127.0.0.1:9").app()) as proxy,
    ):
        record = await ask(str(proxy.make_url("")).rstrip("/"), [5], 1)
    assert record.error == "HTTP 400: too long"


@pytest.fixture(scope="module")
def tiny(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint("llama")


async def test_transformers_server_decodes_a_batch_like_each_alone(tiny: Path) -> None:
    batcher = Batcher(tiny, max_batch=4, dtype=torch.float32)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
    lengths = [6, 9, 4]
    async with TestServer(Server(batcher).app()) as server:
        base = str(server.make_url("")).rstrip("/")
        asked = [
            asyncio.create_task(ask(base, prompt, length))
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        while batcher.jobs.qsize() < 3:
            await asyncio.sleep(0.01)
        batcher.start()
        together = await asyncio.gather(*asked)
        alone = [
            await ask(base, prompt, length) for prompt, length in zip(prompts, lengths, strict=True)
        ]
    assert [record.error for record in (*together, *alone)] == [""] * 6
    assert [record.output_len for record in together] == lengths
    assert [record.token_ids for record in together] == [record.token_ids for record in alone]
