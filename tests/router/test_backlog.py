"""A call remembers only so much of what its client has not read."""

from router.backlog import MAX_EVENTS, MAX_EVENTS_PER_CHOICE, Backlog
from router.request import Delta, Event

DELTA = Delta(0, "x", (1,), (), "", None)


def test_without_a_write_under_way_everything_is_kept() -> None:
    backlog = Backlog(1)
    for _ in range(10 * backlog.limit):
        backlog.put_nowait(DELTA)
    assert backlog.qsize() == 10 * backlog.limit
    assert not backlog.overflow.is_set()


def test_a_client_too_far_behind_is_left() -> None:
    backlog = Backlog(3)
    assert backlog.limit == MAX_EVENTS + 3 * MAX_EVENTS_PER_CHOICE
    backlog.is_writing = True
    for _ in range(backlog.limit):
        backlog.put_nowait(DELTA)
    assert backlog.qsize() == backlog.limit and not backlog.overflow.is_set()
    backlog.put_nowait(DELTA)
    assert backlog.overflow.is_set()
    assert backlog.get_nowait() is None, "the end, instead of what was not read"
    backlog.put_nowait(DELTA)
    assert backlog.empty()


def test_what_can_be_written_at_once_waits_only_behind_others() -> None:
    backlog = Backlog(1)
    written: list[Event | None] = []
    is_open = True

    def write(item: Event | None) -> bool:
        if is_open:
            written.append(item)
        return is_open

    backlog.write_now = write
    backlog.put_nowait(DELTA)
    assert written == [DELTA] and backlog.empty()
    is_open = False
    backlog.put_nowait(DELTA)
    assert backlog.qsize() == 1
    is_open = True
    backlog.put_nowait(None)
    assert written == [DELTA] and backlog.qsize() == 2, "nothing overtakes what waits"
    assert (backlog.get_nowait(), backlog.get_nowait()) == (DELTA, None)
    backlog.is_writing = True
    backlog.put_nowait(DELTA)
    assert written == [DELTA] and backlog.qsize() == 1, "nor what is being written"
