import numpy as np
import pytest

from common.model.philox import philox4x32, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # The known answers of the authors' Random123 library, philox4x32 with 10 rounds.
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox4x32(np.array([counter], np.uint64), np.array([key], np.uint64))
    assert tuple(words[0].tolist()) == expected


def test_uniforms_take_53_bits_of_the_first_two_words() -> None:
    [u] = uniforms([(0, 0, 0)])
    assert u == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53


def test_uniforms_are_the_same_alone_and_in_a_batch() -> None:
    draws = [(seed, choice, index) for seed in (1, 2**63) for choice in (0, 1) for index in (0, 7)]
    together = uniforms(draws).tolist()
    assert together == [uniforms([draw]).tolist()[0] for draw in draws]
    assert len(set(together)) == len(draws)


def test_negative_seed_is_the_64_bit_number_with_the_same_bits() -> None:
    assert uniforms([(-1, 0, 0)]) == uniforms([(2**64 - 1, 0, 0)])


def test_uniforms_fill_the_interval_evenly() -> None:
    values = uniforms([(42, 0, index) for index in range(20_000)])
    assert 0 <= values.min() and values.max() < 1
    counts = np.histogram(values, bins=50, range=(0, 1))[0]
    chi_square = float(((counts - 400) ** 2 / 400).sum())
    assert chi_square < 85.35  # the 0.999 quantile with 49 degrees of freedom
    assert abs(float(np.corrcoef(values[:-1], values[1:])[0, 1])) < 0.03


def test_no_draws() -> None:
    assert uniforms([]).shape == (0,)
