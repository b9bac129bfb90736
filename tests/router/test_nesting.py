"""Small values are small, and large ones are not walked through."""

from typing import Any

import pytest

from router.nesting import MAX_DEPTH, MAX_VALUES, has_few, is_small


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [None, 1, "x" * 10_000, [], {}, {"a": [{"b": [1, 2]}]}])
def test_small(value: object) -> None:
    assert is_small(value)


def test_depth() -> None:
    assert is_small(nested(MAX_DEPTH))
    assert not is_small(nested(MAX_DEPTH + 1))
    assert not is_small({"a": nested(MAX_DEPTH)})


def test_number_of_values() -> None:
    assert is_small([1] * MAX_VALUES)
    assert not is_small([1] * (MAX_VALUES + 1))
    assert not is_small([[1] * MAX_VALUES])
    shared: Any = [1] * 2
    for _ in range(MAX_DEPTH - 2):
        shared = [shared, shared]
    assert not is_small(shared)


@pytest.mark.parametrize(
    ("text", "count"),
    [("{}", 1), ("[1,2,3]", 3), ('{"a":[1,{"b":2}]}', 4), ("[[],[]]", 4), ('",[{"', 3), ("1", 0)],
)
def test_values_are_counted_in_the_text(text: str, count: int) -> None:
    body = bytearray(text.encode())
    assert has_few(body, count) and has_few(bytes(body), count)
    assert count == 0 or not has_few(body, count - 1)
