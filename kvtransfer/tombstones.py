"""A bounded memory of what has ended, so that late messages are recognised."""

from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Tombstones(Generic[K, V]):
    """Remembers the value of a key for `life_s` seconds, of the last `limit` keys at most."""

    def __init__(self, life_s: float, limit: int = 1 << 16) -> None:
        self._life_s = life_s
        self._limit = limit
        self._values: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def add(self, key: K, value: V, now: float) -> None:
        self._values.pop(key, None)
        self._values[key] = (now + self._life_s, value)
        if len(self._values) > self._limit:
            self._values.popitem(last=False)

    def get(self, key: K) -> V | None:
        entry = self._values.get(key)
        return entry[1] if entry else None

    def expire(self, now: float) -> None:
        while self._values:
            key, (until, _) = next(iter(self._values.items()))
            if until > now:
                return
            del self._values[key]
