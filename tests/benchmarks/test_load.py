"""Prompts as text and as chat messages, for servers that take no token ids."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import load, serve
from benchmarks.run import Run, run
from common import random_model
from tests.benchmarks.test_serve import arguments

ROLE = {"delta": {"role": "assistant", "content": ""}, "index": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer has one token per byte."""
    directory = tmp_path_factory.mktemp("model")
    random_model.write(directory)
    return directory


@asynccontextmanager
async def recording(choices: list[dict[str, Any]], usage: int) -> AsyncIterator[Any]:
    """A server that answers with these choices; yields its URL and what it was asked."""
    asked: list[tuple[str, dict[str, Any]]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        size = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        body = msgspec.json.decode(await reader.readexactly(size))
        asked.append((head.split()[1].decode(), body))
        events: list[dict[str, Any]] = [{"choices": [choice]} for choice in choices]
        events.append({"choices": [], "usage": {"prompt_tokens": usage, "completion_tokens": 2}})
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        answer = f"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{text}data: [DONE]\n\n"
        writer.write(answer.encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", asked


async def bench(url: str, *argv: str) -> Run:
    args = arguments(
        "--base-url", url, "--num-prompts", "1", "--random-input-len", "9",
        "--random-output-len", "2", *argv,
    )  # fmt: skip
    load.check(args)
    result = await run(serve.build_target(args), load.plan(args, 0), progress=False)
    assert [record.error for record in result.records] == [""]
    return result


async def test_text_prompts(model: Path) -> None:
    async with recording([{"text": "a"}, {"text": "b"}], 11) as (url, asked):
        result = await bench(url, "--tokenizer", str(model), "--model", "m")
    ((path, body),) = asked
    assert (path, body["model"], body["max_tokens"]) == ("/v1/completions", "m", 2)
    assert isinstance(body["prompt"], str) and 0 < len(body["prompt"]) <= 9
    assert result.records[0].input_len == 11, "as the server counts"


async def test_chat(model: Path) -> None:
    chunks = [{"delta": {"content": "a"}}, {"delta": {"content": "b"}}]
    async with recording([ROLE, *chunks], 20) as (url, asked):
        result = await bench(url, "--backend", "openai-chat", "--tokenizer", str(model))
    ((path, body),) = asked
    assert path == "/v1/chat/completions"
    assert "prompt" not in body
    assert [message["role"] for message in body["messages"]] == ["user"]
    # Saying who speaks is no token.
    assert len(result.records[0].chunks) == 2


async def test_a_role_that_comes_with_text_is_a_token(model: Path) -> None:
    first = {"delta": {"role": "assistant", "content": "a"}}
    async with recording([first, {"delta": {"content": "b"}}], 20) as (url, _):
        result = await bench(url, "--backend", "openai-chat", "--tokenizer", str(model))
    assert len(result.records[0].chunks) == 2


async def test_empty_text_in_a_chat_is_a_token(model: Path) -> None:
    held = {"delta": {"content": ""}}
    async with recording([ROLE, held, {"delta": {"content": "ab"}}], 20) as (url, _):
        result = await bench(url, "--backend", "openai-chat", "--tokenizer", str(model))
    assert len(result.records[0].chunks) == 2


def test_token_ids_stay_within_the_tokenizer(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load.load_tokenizer(str(model)).get_vocab_size() == 258
    assert serve.main(["--base-url", "http://127.0.0.1:9", "--tokenizer", str(model.parent)]) == 2
    assert "error: --tokenizer " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--backend", "openai-chat"], "--backend openai-chat takes text: it needs --tokenizer"),
        (["--burstiness", "0"], "--burstiness must be above 0"),
        (["--trace-length-scale", "0"], "rates and scales must be above 0"),
        (["--vocab-size", "3"], "--vocab-size must be above 3"),
        (["--extra-body", "[]"], "--extra-body is not a JSON object"),
    ],
)
def test_clashes(argv: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--base-url", "http://127.0.0.1:9", *argv]) == 2
    assert capsys.readouterr().err == f"tandem bench serve: error: {line}\n"
