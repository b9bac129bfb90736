"""Small values are small, and large ones are not walked through."""

from typing import Any

import pytest

from router.nesting import MAX_DEPTH, MAX_VALUES, is_small


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
