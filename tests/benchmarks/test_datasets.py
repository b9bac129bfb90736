"""Arrivals and prompts: distributions, prefixes, and that seeds decide everything."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks import arrivals, datasets


def test_poisson_and_fixed_rate() -> None:
    rng = np.random.default_rng(1)
    poisson = list(arrivals.rate_arrivals(20_000, 50.0, 1.0, rng))
    gaps = np.diff(poisson)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03)
    fixed = list(arrivals.rate_arrivals(5, 50.0, math.inf, rng))
    assert fixed == pytest.approx([0.0, 0.02, 0.04, 0.06, 0.08])
    assert list(arrivals.burst_arrivals(5, 4.0, 2)) == [0.0, 0.0, 0.5, 0.5, 1.0]
    assert list(arrivals.rate_arrivals(2, math.inf, 1.0, rng)) == [0.0, 0.0]


def test_trace_ticks_are_spread_in_order() -> None:
    rng = np.random.default_rng(0)
    due = arrivals.trace_arrivals([1000, 1000, 1000, 4000, 7000], 2.0, rng)
    assert due[0] == 0.0
    assert all(a <= b for a, b in pairwise(due))
    assert due[3] <= 1.5 < due[4] + 0.01


def test_trace_keeps_its_prefix_structure(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 0, "input_length": 1200, "output_length": 64, "hash_ids": [1, 2, 3]}\n'
        '{"timestamp": 5, "input_length": 1100, "output_length": 8, "hash_ids": [1, 2, 9]}\n'
    )
    first, second = datasets.trace_queries(path, 200, (0,), length_scale=1 / 16)
    assert (len(first.tokens()), len(second.tokens())) == (75, 69)
    assert (first.input_len, second.input_len) == (75, 69)
    assert first.tokens()[:64] == second.tokens()[:64]
    assert first.tokens()[64:69] != second.tokens()[64:69]
    # Equal in another run with this seed, other tokens with another seed.
    again, _ = datasets.trace_queries(path, 200, (0,), length_scale=1 / 16)
    assert again.tokens() == first.tokens()
    other, _ = datasets.trace_queries(path, 200, (1,), length_scale=1 / 16)
    assert other.tokens() != first.tokens()
    assert (first.output_len, second.timestamp_ms) == (4, 5.0)
    path.write_text('{"timestamp": 0}\n')
    with pytest.raises(ValueError, match=r"trace.jsonl, line 1: KeyError"):
        list(datasets.trace_queries(path, 200, (0,)))


def test_last_tick_of_a_trace_is_spread_like_the_one_before() -> None:
    rng = np.random.default_rng(0)
    due = arrivals.trace_arrivals([0, 3000, 3000, 3000], 1.0, rng)
    assert len(set(due)) == 4
    assert 3.0 <= due[1] and due[3] <= 6.0
    assert arrivals.trace_arrivals([5, 5], 1.0, rng) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"timestamp": 5, "input_length": 1, "output_length": 1}\n'
         '{"timestamp": 4, "input_length": 1, "output_length": 1}\n', "line 2: .*4 after 5"),
        ('{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [-1]}\n',
         "line 1: .*negative hash id"),
        ("{\n", "line 1: JSONDecodeError"),
    ],
)  # fmt: skip
def test_malformed_traces_are_refused(tmp_path: Path, rows: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(rows)
    with pytest.raises(ValueError, match=message):
        list(datasets.trace_queries(path, 200, (0,)))


def test_a_long_trace_takes_no_memory_before_it_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    ids = list(range(200))
    row = f'{{"timestamp": 0, "input_length": 100000, "output_length": 9, "hash_ids": {ids}}}\n'
    path.write_text(row * 50)
    queries = list(datasets.trace_queries(path, 50000, (0,)))
    assert sum(query.input_len for query in queries) == 5_000_000
    assert all(len(query.parts) <= 200 for query in queries)
    tokens = queries[3].tokens()
    assert len(tokens) == 100_000
    assert min(tokens) >= datasets.FIRST_TOKEN and max(tokens) < 50000


def test_prefixes_are_shared_within_a_seed() -> None:
    lengths = datasets.Lengths(8, 4)
    one, two = datasets.random_queries(2, lengths, 200, (7,), prefix_len=16)
    assert one.tokens()[:16] == two.tokens()[:16]
    assert one.tokens()[16:] != two.tokens()[16:]
    groups = {
        tuple(q.tokens()[:32]) for q in datasets.prefix_queries(40, 3, 32, lengths, 200, (7,))
    }
    assert len(groups) == 3
    turns = list(datasets.conversation_queries(7, 3, lengths, 200, (7,)))
    assert [query.follows for query in turns] == [None, None, None, 0, 1, 2, 3]
