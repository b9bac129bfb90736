"""What a simulation reads: traces, hardware, limits, failures."""

import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from common.blockhash import BlockHash
from common.errors import ConfigError
from router.simulate import failures, model, slo, trace
from router.simulate.failures import Failure
from router.simulate.model import Hardware
from router.simulate.slo import Slo
from router.simulate.trace import Request
from router.slo import Limit

ROW: dict[str, Any] = {"timestamp": 1500, "input_length": 600, "output_length": 3}


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "little"))


def write(path: Path, *rows: object) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w")
    with opened as file:
        file.write(text)
    return str(path)


@pytest.mark.parametrize("file", ["t.jsonl", "t.jsonl.gz"])
def test_a_trace_is_read_in_order_of_arrival(tmp_path: Path, file: str) -> None:
    path = write(tmp_path / file, ROW | {"hash_ids": [7, 8]}, ROW | {"timestamp": 0})
    assert trace.load(path) == [
        Request(0.0, 600, 3, ()),
        Request(1.5, 600, 3, (name(7), name(8))),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "request 1: KeyError"),
        (ROW | {"input_length": 0}, "input_length must be at least 1"),
        (ROW | {"hash_ids": ["x"]}, "request 1: ValueError"),
        ([], "request 1: AttributeError"),
    ],
)
def test_a_bad_trace_is_one_clear_error(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trace.load(write(tmp_path / "t.jsonl", row))


def test_a_trace_that_is_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        trace.load(str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="no requests"):
        trace.load(write(tmp_path / "t.jsonl"))


def test_synthetic_turns_share_their_prefix() -> None:
    requests = trace.load("synthetic:requests=400,turns=4,seed=3")
    assert requests == trace.load("synthetic:requests=400,turns=4,seed=3")
    assert len(requests) == 400
    assert all(r.blocks[0] == name(0) for r in requests)
    assert all(len(r.blocks) == r.prompt // 512 for r in requests)
    assert 1 < trace.rate(requests) < 8
    with pytest.raises(ConfigError, match="'hum=1': expected requests, rate"):
        trace.load("synthetic:hum=1")


def test_requests_of_one_tick_are_spread_up_to_the_next() -> None:
    requests = [Request(at, 1, 1, ()) for at in (0.0, 3.0, 3.0, 3.0, 6.0, 6.0)]
    times = trace.arrivals(requests, 2.0, Random(0))
    assert times == sorted(times)
    assert [times[0], *times[4:]] == [0.0, 3.0, 3.0]
    assert all(1.5 <= at < 3.0 for at in times[1:4]) and len(set(times[1:4])) == 3


def test_limits() -> None:
    assert slo.parse("2s+1.5x", "50ms") == Slo(Limit(2.0, 1.5), 0.05)
    assert slo.parse("500ms", "1s") == Slo(Limit(0.5), 1.0)
    assert slo.parse("2s+1.5x", "50ms").ttft(4.0) == 8.0
    for ttft, tpot in (("2", "50ms"), ("2s+x", "50ms"), ("2s", "50"), ("-2s", "50ms")):
        with pytest.raises(ConfigError, match="is no limit such as"):
            slo.parse(ttft, tpot)


def test_hardware(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text('{"prefill_s": 0.5, "chunk_tokens": 100}')
    hardware = model.load(path)
    assert hardware == Hardware(prefill_s=0.5, chunk_tokens=100)
    assert hardware.prefill(250, 0) == pytest.approx(1.5 + 250 * 5e-5 + 8.3e-10 * 250 * 125)
    assert Hardware().transfer(1_000_000) == pytest.approx(2.048)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected an object of block_tokens"),
        ('{"speed": 1}', "expected an object of"),
        ('{"token_s": "1"}', "token_s must be a number"),
        ('{"block_tokens": 1.5}', "block_tokens must be a whole number"),
        ('{"token_s": 0}', "token_s must be positive"),
        ("{", "model"),
    ],
)
def test_bad_hardware_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        model.load(path)


def test_failures() -> None:
    assert failures.parse("p0@100,d1@50.5+2", 1, 2) == [
        Failure("p0", 100.0, 30.0),
        Failure("d1", 50.5, 2.0),
    ]
    assert failures.parse("", 1, 1) == []
    with pytest.raises(ConfigError, match="no worker d1"):
        failures.parse("d1@5", 1, 1)
    with pytest.raises(ConfigError, match="'x' is no failure"):
        failures.parse("x", 1, 1)
