"""What clients ask answers to match, as grammars for the workers: compiled elsewhere, remembered.

A grammar may take any time and memory to compile, so it is compiled in a process that is killed
when it is over its time or dies of its memory; a new one serves the next. Owned by
`router.intake`.
"""

import asyncio
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from common.errors import GrammarError, RequestError
from router.errors import unavailable

NUM_PROCESSES: Final = 2
MAX_REMEMBERED: Final = 512
MAX_REMEMBERED_BYTES: Final = 16 << 20
START_S: Final = 60.0
"""How long a process may take to read the tokenizer."""
RETRY_S: Final = 60.0
"""How long a grammar is not tried again whose process was ended: the machine may have been busy."""
_LINE: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Constraint:
    """`kind`: json (a schema), regex, choice (a JSON list of strings) or grammar (Lark, GBNF)."""

    kind: str
    text: str
    param: str
    """What the client called it."""


class EndedError(GrammarError):
    """The process that compiled it had to be ended."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.until = time.monotonic() + RETRY_S
        """When it may be tried again."""


class _Answer(msgspec.Struct):
    grammar: str | None = None
    error: str | None = None


class Grammars:
    def __init__(self, directory: Path, timeout_s: float = 5.0) -> None:
        self._directory = directory
        self._timeout_s = timeout_s
        self._known: OrderedDict[tuple[str, str], str | GrammarError] = OrderedDict()
        self._num_bytes = 0
        self._free: list[asyncio.subprocess.Process] = []
        self._seats = asyncio.Semaphore(NUM_PROCESSES)

    async def compile(self, constraint: Constraint, vocab_size: int, eos: Sequence[int]) -> str:
        """The grammar for the workers. Raises RequestError (400)."""
        key = (constraint.kind, constraint.text)
        result = self._recall(key)
        if result is None:
            async with self._seats:
                # Others may have asked the same, and waited less.
                result = self._recall(key)
                if result is None:
                    result = await self._ask(constraint, vocab_size, eos)
                    self._remember(key, result)
        if isinstance(result, GrammarError):
            message = f"Invalid '{constraint.param}': {result}"
            raise RequestError(400, message, param=constraint.param, code="invalid_grammar")
        return result

    async def close(self) -> None:
        for process in self._free:
            await _end(process)
        self._free.clear()

    def _recall(self, key: tuple[str, str]) -> str | GrammarError | None:
        result = self._known.get(key)
        if isinstance(result, EndedError) and time.monotonic() > result.until:
            return None
        if result is not None:
            self._known.move_to_end(key)
        return result

    def _remember(self, key: tuple[str, str], result: str | GrammarError) -> None:
        if key in self._known:
            self._num_bytes -= _size(key, self._known.pop(key))
        self._known[key] = result
        self._num_bytes += _size(key, result)
        while len(self._known) > MAX_REMEMBERED or self._num_bytes > MAX_REMEMBERED_BYTES:
            self._num_bytes -= _size(*self._known.popitem(last=False))

    async def _ask(
        self, constraint: Constraint, vocab_size: int, eos: Sequence[int]
    ) -> str | GrammarError:
        process = self._free.pop() if self._free else await self._start(vocab_size, eos)
        done = False
        try:
            assert process.stdin is not None and process.stdout is not None
            question = {"kind": constraint.kind, "text": constraint.text}
            process.stdin.write(msgspec.json.encode(question) + b"\n")
            async with asyncio.timeout(self._timeout_s):
                line = await process.stdout.readline()
            if not line:
                return EndedError("it is too complex: compiling takes too much memory")
            done = True
        except TimeoutError:
            return EndedError(f"it is too complex: compiling takes over {self._timeout_s:g} s")
        finally:
            # Whatever interrupts this, also a client that leaves: no answer is left unread.
            if done:
                self._free.append(process)
            else:
                await asyncio.shield(_end(process))
        answer = msgspec.json.decode(line, type=_Answer)
        return answer.grammar if answer.grammar is not None else GrammarError(answer.error or "")

    async def _start(self, vocab_size: int, eos: Sequence[int]) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "router.grammar_process",
            str(os.getpid()),
            str(self._directory),
            str(vocab_size),
            ",".join(map(str, eos)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_LINE,
        )
        assert process.stdout is not None
        ready = b""
        try:
            async with asyncio.timeout(START_S):
                ready = await process.stdout.readline()
        except TimeoutError:
            raise unavailable("Structured output is not ready.") from None
        finally:
            if not ready:
                await asyncio.shield(_end(process))
        if not ready:
            raise unavailable("Structured output is not ready.")
        return process


def _size(key: tuple[str, str], result: str | GrammarError) -> int:
    return len(key[1]) + len(str(result))


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
    # The transport keeps its pipes until it is told; waiting does not close them.
    process._transport.close()  # type: ignore[attr-defined]
