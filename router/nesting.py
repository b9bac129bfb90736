"""How large a JSON value may be: for `fields`, `prompts` and `app`."""

from typing import Final

MAX_DEPTH: Final = 64
"""Of the arguments of calls, which are JSON within JSON."""
MAX_VALUES: Final = 4_096
_BEFORE_VALUES: Final = b",[{"


def has_few(body: bytes | bytearray, most: int) -> bool:
    """Whether a JSON text has at most `most` commas and opening brackets, and so about as many
    values. Those in its texts count, too: nothing is decoded for it.
    """
    if len(body) <= most:
        return True
    return len(body) - len(body.translate(None, _BEFORE_VALUES)) <= most


def is_small(value: object, depth: int = MAX_DEPTH) -> bool:
    """Whether `value` is at most `depth` deep and holds at most `MAX_VALUES` values.

    Looks at no more than those, however large it is.
    """
    level = [value]
    left = MAX_VALUES
    for _ in range(depth + 1):
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


def is_flat(value: object, body: bytes | bytearray, depth: int) -> bool:
    """Whether `value`, decoded from `body`, is at most `depth` deep, however many values it holds.

    A body with few brackets, as nearly all are, is not walked through.
    """
    if body.count(b"[") + body.count(b"{") <= depth:
        return True
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(depth):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, list | dict)
        ]
        if not level:
            return True
    return False
