"""The highest rate at which a part of the requests meets its limits."""

import math
from collections.abc import Callable


def goodput(
    attainment: Callable[[float], float],
    target: float,
    start: float,
    tolerance: float = 0.01,
    least: float = 0.0,
) -> float:
    """The highest rate (requests/s) with at least `target` attainment, within `tolerance` of it.

    `attainment(rate)` is taken to fall with the rate; it is asked from `start` on. 0 if even
    `least`, or a thousandth of `start`, is too much.
    """
    low, high = 0.0, math.inf
    rate = start
    while True:
        if attainment(rate) >= target:
            low = rate
        else:
            high = rate
        if low == 0.0:
            if high < max(least, start / 1000):
                return 0.0
            rate = high / 2
        elif math.isinf(high):
            if low > start * 1000:
                return low
            rate = low * 1.5
        elif high / low <= 1 + tolerance:
            return low
        else:
            rate = math.sqrt(low * high)
