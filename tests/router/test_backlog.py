"""A call remembers only so much of what its client has not read."""

from router.backlog import MAX_EVENTS, MAX_EVENTS_PER_CHOICE, Backlog
from router.request import Delta

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
