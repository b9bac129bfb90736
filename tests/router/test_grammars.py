"""Grammars are compiled once however many ask, and an ended process is no verdict for ever."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import GrammarError, RequestError
from router import grammars
from router.grammars import NUM_PROCESSES, Constraint, EndedError, Grammars

ASKED = Constraint("regex", "a+", "guided_regex")
OTHER = Constraint("regex", "b+", "guided_regex")


class Slow(Grammars):
    """Answers when it may, as `answers` says, the last of them again and again."""

    def __init__(self, *answers: str | GrammarError) -> None:
        super().__init__(Path("/nonexistent"))
        self.may = asyncio.Event()
        self.answers = list(answers)
        self.count = 0

    async def _ask(
        self, constraint: Constraint, vocab_size: int, eos: Sequence[int]
    ) -> str | GrammarError:
        self.count += 1
        await self.may.wait()
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


async def ask(known: Grammars, constraint: Constraint = ASKED) -> str:
    return await known.compile(constraint, 320, (0,))


@pytest.mark.parametrize("mishap", [None, GrammarError, EndedError])
async def test_who_waits_for_a_seat_takes_what_came_meanwhile(
    mishap: type[GrammarError] | None,
) -> None:
    known = Slow("compiled" if mishap is None else mishap("no"))
    tasks = [asyncio.create_task(ask(known)) for _ in range(50)]
    while known.count < NUM_PROCESSES:
        await asyncio.sleep(0)
    known.may.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert known.count == NUM_PROCESSES
    if mishap is None:
        assert set(results) == {"compiled"}
    else:
        assert all(isinstance(result, RequestError) for result in results)


async def test_an_ended_process_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5.0
    monkeypatch.setattr(grammars, "time", SimpleNamespace(monotonic=lambda: now))
    known = Slow(EndedError("too complex"), "compiled")
    known.may.set()
    for _ in range(3):
        with pytest.raises(RequestError, match="too complex"):
            await ask(known)
    assert known.count == 1
    now += grammars.RETRY_S + 1
    assert [await ask(known) for _ in range(3)] == ["compiled"] * 3
    assert known.count == 2


async def test_what_is_wrong_stays_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5.0
    monkeypatch.setattr(grammars, "time", SimpleNamespace(monotonic=lambda: now))
    known = Slow(GrammarError("not a regex"), "compiled")
    known.may.set()
    for _ in range(2):
        with pytest.raises(RequestError, match="not a regex"):
            await ask(known)
        now += grammars.RETRY_S + 1
    assert known.count == 1
    assert await ask(known, OTHER) == "compiled"


async def test_what_is_remembered_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MAX_REMEMBERED", 3)
    known = Slow("compiled")
    known.may.set()
    for number in (0, 1, 2, 0, 3, 0, 1):
        await ask(known, Constraint("regex", f"a{number}", "guided_regex"))
    assert known.count == 5, "the one that was asked for longest ago is forgotten"
