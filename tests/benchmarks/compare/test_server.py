"""Processes of a comparison: ready means ready, and nothing is left at the end."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.compare.paths import ROOT
from benchmarks.compare.server import (
    Command,
    StartError,
    answers,
    free_ports,
    num_workers,
    running,
)

SERVER = """
import http.server, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *arguments): pass
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def await_end(process: psutil.Process) -> None:
    deadline = time.monotonic() + 10.0
    try:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "a child outlived its server"
            time.sleep(0.02)
    except psutil.NoSuchProcess:
        return  # it ended between the two questions


def command(program: str, *arguments: str, port: int = 0) -> Command:
    core = min(os.sched_getaffinity(0))
    argv = (sys.executable, "-c", program, *arguments)
    return Command("one", argv, port, (core,), {"COLOUR": "red"})


def test_starts_pinned_and_leaves_nothing(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with running([command(SERVER, str(port), port=port)], tmp_path, 30.0):
        assert answers(f"http://127.0.0.1:{port}/health")
        child = psutil.Process(int((tmp_path / "one.log").read_text()))
        assert child.cpu_affinity() == [min(os.sched_getaffinity(0))]
        assert child.environ()["COLOUR"] == "red"
    assert not answers(f"http://127.0.0.1:{port}/health")
    await_end(child)


GATHERING = """
import http.server, json, sys
asked = 0
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += self.path == "/debug/workers"
        body = json.dumps({"workers": [{}] * asked}).encode()
        self.send_response(401 if asked > 3 else 200)
        self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_deployment_is_ready_with_its_last_worker(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    two = dataclasses.replace(command(GATHERING, str(port), port=port), workers=2)
    with running([two], tmp_path, 30.0):
        assert num_workers(url, 0) == 3, "the third to ask"
        assert num_workers(url, 7) == 7, "it wants a key: taken to be complete"
    assert num_workers(url, 7) == 0


def test_a_server_ends_with_a_comparison_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from benchmarks.compare.server import Command, running\n"
        "port, logs = int(sys.argv[1]), Path(sys.argv[2])\n"
        f"command = Command('one', (sys.executable, '-c', {SERVER!r}, str(port)), port, "
        f"({min(os.sched_getaffinity(0))},))\n"
        "with running([command], logs, 30.0):\n"
        "    print(flush=True); time.sleep(600)\n"
    )
    (port,) = free_ports(1)
    argv = [sys.executable, "-c", program, str(port), str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=ROOT) as comparison:
        assert comparison.stdout is not None
        comparison.stdout.readline()
        child = psutil.Process(int((tmp_path / "one.log").read_text()))
        comparison.kill()
    await_end(child)
    assert not answers(f"http://127.0.0.1:{port}/health")


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    program = "import sys; sys.exit('no such model')"
    with (
        pytest.raises(StartError, match=r"(?s)one ended with code 1.*no such model"),
        running([command(program)], tmp_path, 30.0),
    ):
        pass


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with (
        pytest.raises(StartError, match="one was not ready in time"),
        running([command("import time; time.sleep(600)")], tmp_path, 0.5),
    ):
        pass


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20
