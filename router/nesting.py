"""How large a decoded JSON value may be that nobody reads: used by `schemas` and `prompts`."""

from typing import Final

MAX_DEPTH: Final = 64
MAX_VALUES: Final = 4_096


def is_small(value: object) -> bool:
    """Whether `value` is at most `MAX_DEPTH` deep and holds at most `MAX_VALUES` values.

    Looks at no more than those, however large it is.
    """
    level = [value]
    left = MAX_VALUES
    for _ in range(MAX_DEPTH + 1):
        containers = [item for item in level if isinstance(item, list | dict)]
        if not containers:
            return True
        left -= sum(map(len, containers))
        if left < 0:
            return False
        level = [
            item
            for container in containers
            for item in (container.values() if isinstance(container, dict) else container)
        ]
    return False
