"""1P1D in two processes on one device: a prompt's KV leaves one pool for the other while both
compute. Used by `benchmarks.gpu`, which starts the prefill process with `--peer`.

The two talk over a Unix socket of the standard library, one JSON object per line. The decode
process reads the prefill process's pool: on CUDA through a CUDA IPC mapping, copied by its own
stream; where that cannot be had, out of sealed shared memory into which the prefill process copies
each block (`common.kv.shared`, as the project's shm transport does).
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.cuda.measure import Machine
from benchmarks.cuda.models import BLOCK, Model, Result, prompt_of
from common.kv.shared import PeerBlocks, SharedBlocks
from common.model.batch import Row

START_TIMEOUT_S: Final = 120
_FIRST: Final = 0
"""The pools of both processes are laid out alike: the prompt takes the blocks from here on."""

Message = dict[str, Any]


class Line:
    """JSON objects over a connected socket, one per line."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rw", encoding="ascii", newline="\n")
        connection.close()

    def send(self, message: Message) -> None:
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()

    def receive(self) -> Message:
        """Raises ConnectionError when the other side has gone."""
        text = self._file.readline()
        if not text:
            raise ConnectionError("the other process of the pair has gone")
        message: Message = json.loads(text)
        return message

    def close(self) -> None:
        self._file.close()


# ---------------------------------------------------------------- the prefill process


def serve(path: str, name: str, machine: Machine, num_blocks: int) -> None:
    """Compute prompts for the process that listens at `path`, until it closes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        line = Line(connection)
    model = Model(name, machine, num_blocks)
    hello, staged = _export(model)
    line.send(hello)
    mapped = line.receive()["mapped"]
    if not mapped:
        staged = SharedBlocks(num_blocks, model.pool.block_bytes)
        line.send(_shared(staged))
    while True:
        try:
            request = line.receive()
        except ConnectionError:
            break
        _prefill(model, line, request, staged)
    line.close()


def _export(model: Model) -> tuple[Message, SharedBlocks | None]:
    if model.machine.cuda:
        storage = model.pool.tensor.untyped_storage()
        try:
            parts = storage._share_cuda_()
        except RuntimeError as error:
            return {"way": "none", "why": str(error).splitlines()[0]}, None
        fields = [part.hex() if isinstance(part, bytes) else part for part in parts]
        return {"way": "cuda-ipc", "handle": fields}, None
    staged = SharedBlocks(model.pool.num_blocks, model.pool.block_bytes)
    return _shared(staged), staged


def _shared(staged: SharedBlocks) -> Message:
    return {"way": "shared-memory", "fd": f"/proc/{os.getpid()}/fd/{staged.fd}"}


def _prefill(model: Model, line: Line, request: Message, staged: SharedBlocks | None) -> None:
    prompt, chunk = prompt_of(model.spec, request["tokens"], request["seed"]), request["chunk"]
    blocks = list(range(_FIRST, _FIRST + -(-len(prompt) // BLOCK)))
    offered = _FIRST
    for start in range(0, len(prompt), chunk):
        part = prompt[start : start + chunk]
        # The wait for its token also means that the KV of the chunk is written.
        [token] = model.step([Row(part, start, blocks)])
        last = start + len(part) == len(prompt)
        ready = len(blocks) if last else (start + len(part)) // BLOCK
        if staged is not None:
            for block in range(offered, ready):
                size = model.pool.block_bytes
                view = staged.blocks[block * size : (block + 1) * size]
                target = torch.frombuffer(view, dtype=model.pool.tensor.dtype)
                target.copy_(model.pool.tensor[block].view(-1))
        line.send({"blocks": [offered, ready], "token": token if last else None})
        offered = ready


# ---------------------------------------------------------------- the decode process


class Source:
    """The prefill process's pool as the decode process reads it."""

    def __init__(self, line: Line, model: Model) -> None:
        self._pool = model.pool
        self._peer: PeerBlocks | None = None
        self._mapped: torch.Tensor | None = None
        self._stream = torch.cuda.Stream() if model.machine.cuda else None
        self.why = ""
        hello = line.receive()
        if hello["way"] == "cuda-ipc":
            fields = [bytes.fromhex(f) if isinstance(f, str) else f for f in hello["handle"]]
            try:
                storage = torch.UntypedStorage._new_shared_cuda(*fields)
                flat = torch.empty(0, dtype=model.pool.tensor.dtype, device=model.machine.device)
                flat = flat.set_(storage, 0, (model.pool.tensor.numel(),), (1,))
                self._mapped = flat.view(model.pool.tensor.shape)
                self._mapped[0, 0, 0, 0, 0, :1].cpu()
            except RuntimeError as error:
                self.why = str(error).splitlines()[0]
                self._mapped = None
        elif hello["way"] == "none":
            self.why = hello["why"]
        mapped = self._mapped is not None or hello["way"] == "shared-memory"
        line.send({"mapped": mapped})
        if self._mapped is not None:
            self.way = "CUDA IPC"
            return
        if not mapped:
            hello = line.receive()
        self.way = "shared memory"
        fd = os.open(hello["fd"], os.O_RDONLY)
        try:
            self._peer = PeerBlocks(fd, self._pool.num_blocks, self._pool.block_bytes)
        finally:
            os.close(fd)

    def copy(self, first: int, last: int) -> None:
        """Enqueue the copy of these blocks; it goes on beside the steps on the current stream."""
        target = self._pool.tensor
        if self._mapped is not None and self._stream is not None:
            with torch.cuda.stream(self._stream):
                target[first:last].copy_(self._mapped[first:last], non_blocking=True)
            return
        assert self._peer is not None
        for block in range(first, last):
            slab = bytearray(self._peer.slab(block))
            source = torch.frombuffer(slab, dtype=target.dtype).view(target.shape[1:])
            target[block].copy_(source)

    def wait(self) -> None:
        """Until everything that was copied is there."""
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        if self._peer is not None:
            self._peer.close()


def measure_pair(
    model: Model, *, batch: int, context: int, prompt: int, chunk: int
) -> Iterator[Result | str]:
    """`model` decodes `batch` rows while a second process computes a prompt and its KV comes over.

    Yields results, and lines of text to be printed. The prompt's last token is computed from the
    shipped KV and from KV computed here, and must be the same.
    """
    machine = model.machine
    with tempfile.TemporaryDirectory(prefix="tandem-pair-") as directory:
        path = str(Path(directory) / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(1)
            listener.settimeout(START_TIMEOUT_S)
            command = [sys.executable, "-m", "benchmarks.gpu", "--peer", path, model.name]
            command += [str(model.pool.num_blocks)]
            process = subprocess.Popen(command)
            try:
                connection, _ = listener.accept()
                connection.settimeout(None)
                yield from _run(model, Line(connection), batch, context, prompt, chunk)
                # Its socket is closed: it ends by itself.
                if process.wait(START_TIMEOUT_S):
                    yield f"the prefill process ended with code {process.returncode}"
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
    if machine.cuda:
        torch.cuda.synchronize()


def _run(
    model: Model, line: Line, batch: int, context: int, prompt: int, chunk: int
) -> Iterator[Result | str]:
    source = Source(line, model)
    if source.why:
        yield f"1P1D: no CUDA IPC ({source.why}); blocks go through {source.way}"
    prompt_blocks = -(-(prompt + 1) // BLOCK)
    per_row = (model.pool.num_blocks - prompt_blocks) // batch
    room = per_row * BLOCK - context
    tables = [
        list(range(prompt_blocks + i * per_row, prompt_blocks + (i + 1) * per_row))
        for i in range(batch)
    ]
    tokens = prompt_of(model.spec, batch, 1)
    for warm in (True, False):
        line.send({"tokens": prompt, "chunk": chunk, "seed": 3})
        poller = _Poller(line)
        began = time.perf_counter()
        steps: list[float] = []
        token: int | None = None
        while token is None:
            position = context + len(steps) % room
            rows = [Row([t], position, table) for t, table in zip(tokens, tables, strict=True)]
            stepped = time.perf_counter()
            tokens = model.step(rows)
            steps.append(time.perf_counter() - stepped)
            for message in poller.ready():
                source.copy(*message["blocks"])
                token = message["token"]
        computed = time.perf_counter() - began
        source.wait()
        exposed = time.perf_counter() - began - computed
        if warm:
            continue
        steps.sort()
        yield Result(
            model.name,
            f"1P1D over {source.way}: {batch} rows beside a prompt of {prompt}, decode",
            batch * len(steps) / computed,
            statistics.median(steps) * 1e3,
            model.decode_bytes([context] * batch)
            / model.machine.bytes_per_s
            / statistics.median(steps),
        )
        yield Result(
            model.name,
            f"1P1D over {source.way}: prompt of {prompt} in chunks of {chunk}",
            prompt / computed,
            computed * 1e3,
            model.prefill_flops(0, prompt) / model.machine.flops_per_s / computed,
        )
        yield (
            f"1P1D {model.name}: decode step p99 {steps[int(0.99 * (len(steps) - 1))] * 1e3:.2f} "
            f"ms, the copy ended {exposed * 1e3:.2f} ms after the prompt's token"
        )
        assert token is not None
        shipped = _continue(model, prompt, token)
        all_tokens = prompt_of(model.spec, prompt, 3)
        local = 0
        for start in range(0, prompt, chunk):
            blocks = list(range(_FIRST, _FIRST + prompt_blocks))
            [local] = model.step([Row(all_tokens[start : start + chunk], start, blocks)])
        same = (local, _continue(model, prompt, local)) == (token, shipped)
        verdict = "equal to" if same else "DIFFERENT from"
        yield f"1P1D {model.name}: tokens from shipped KV are {verdict} those computed here"
    line.close()
    source.close()


def _continue(model: Model, prompt: int, token: int) -> int:
    """The token after the first one, from the prompt's KV in the pool of the decode process."""
    blocks = list(range(_FIRST, _FIRST + -(-(prompt + 1) // BLOCK)))
    [following] = model.step([Row([token], prompt, blocks)])
    return following


class _Poller:
    """Takes what has come without waiting: a thread reads the lines, as they block."""

    def __init__(self, line: Line) -> None:
        from queue import SimpleQueue
        from threading import Thread

        self._queue: SimpleQueue[Message | ConnectionError] = SimpleQueue()
        self._thread = Thread(target=self._read, args=(line,), daemon=True)
        self._thread.start()

    def _read(self, line: Line) -> None:
        try:
            while True:
                message = line.receive()
                self._queue.put(message)
                if message["token"] is not None:
                    return
        except ConnectionError as error:
            self._queue.put(error)

    def ready(self) -> Iterator[Message]:
        """Raises ConnectionError when the other side has gone."""
        while not self._queue.empty():
            item = self._queue.get()
            if isinstance(item, ConnectionError):
                raise item
            yield item
