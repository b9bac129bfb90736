"""Counter-based random numbers: the same request draws the same numbers on every worker.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011). There is no state: a number is a function of a key and a counter.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

ROUNDS: Final = 10
_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_LOW: Final = np.uint64(0xFFFFFFFF)
_WORD: Final = np.uint64(32)

Words = npt.NDArray[np.uint64]


def philox4x32(counters: Words, keys: Words) -> Words:
    """Four random 32-bit words per line.

    counters: [n, 4], keys: [n, 2], 32-bit words held in uint64. Returns [n, 4].
    """
    c0, c1, c2, c3 = (counters[:, i] for i in range(4))
    k0, k1 = keys[:, 0], keys[:, 1]
    for turn in range(ROUNDS):
        if turn:
            k0 = (k0 + np.uint64(_WEYL[0])) & _LOW
            k1 = (k1 + np.uint64(_WEYL[1])) & _LOW
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _WORD) ^ c1 ^ k0, p1 & _LOW, (p0 >> _WORD) ^ c3 ^ k1, p0 & _LOW
    return np.stack((c0, c1, c2, c3), axis=1)


def uniforms(draws: Sequence[tuple[int, int, int]]) -> npt.NDArray[np.float64]:
    """One number in [0, 1), a multiple of 2**-53, for each (seed, choice, output index).

    The seed is taken modulo 2**64, choice and index modulo 2**32.
    """
    word = 0xFFFFFFFF
    counters = np.array(
        [(index & word, choice & word, 0, 0) for _, choice, index in draws], dtype=np.uint64
    ).reshape(-1, 4)
    keys = np.array(
        [(seed & word, (seed >> 32) & word) for seed, _, _ in draws], dtype=np.uint64
    ).reshape(-1, 2)
    words = philox4x32(counters, keys)
    mantissas = ((words[:, 0] >> np.uint64(5)) << np.uint64(26)) | (words[:, 1] >> np.uint64(6))
    return mantissas.astype(np.float64) * 2.0**-53
