"""Text and JSON log lines of a real process."""

import json
import re
import subprocess
import sys

import pytest

PROGRAM = """
import logging, sys
from common.config import LogConfig
from common.log import setup
setup(LogConfig(log_level=sys.argv[1], log_format=sys.argv[2]), "decode", sys.argv[3])
log = logging.getLogger("decode.worker")
log.debug("hidden")
log.info("placed %d", 3, extra={"request": 7, "note": "a b"})
logging.getLogger("somebody.else").info("chatter")
logging.getLogger("somebody.else").warning("warned")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
"""


def lines(level: str, format: str, ident: str = "decode-1") -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, level, format, ident],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == ""
    return result.stderr.splitlines()


def test_text() -> None:
    first, second, third, *trace = lines("info", "text")
    clock = r"^\d\d:\d\d:\d\d\.\d{3} "
    assert re.fullmatch(clock + "INFO decode-1: placed 3 request=7 note=a b", first)
    assert re.fullmatch(clock + "WARNING decode-1: warned", second)
    assert re.fullmatch(clock + "ERROR decode-1: failed", third)
    assert trace[-1] == "ZeroDivisionError: division by zero"


def test_text_without_a_name_shows_the_role() -> None:
    assert " INFO decode: placed 3" in lines("info", "text", "")[0]


def test_json_is_one_object_per_line() -> None:
    placed, warned, failed = (json.loads(line) for line in lines("info", "json"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", placed.pop("ts"))
    assert placed == {
        "level": "info",
        "logger": "decode.worker",
        "role": "decode",
        "worker": "decode-1",
        "event": "placed 3",
        "request": 7,
        "note": "a b",
    }
    assert warned["event"] == "warned"
    assert "ZeroDivisionError" in failed["exception"]


@pytest.mark.parametrize(("level", "count"), [("debug", 4), ("warning", 2), ("error", 1)])
def test_level(level: str, count: int) -> None:
    assert len(lines(level, "json")) == count
