"""Copies and digests: natively and without a compiler they are the same."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from kvtransfer import copying
from kvtransfer.copying import address_of, copy_blocks, digest_blocks, library
from kvtransfer.memory import digest
from tests.kvtransfer.pool import BytePool


@pytest.fixture(params=["native", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(copying, "library", lambda: None)
    elif library() is None:
        pytest.skip("needs a C++ compiler")
    return str(request.param)


@pytest.mark.parametrize("num_bytes", [48, 256, 320, 1024, 1088, 2048, 12_352])
def test_copies_runs_to_slabs_and_skips(way: str, num_bytes: int) -> None:
    source, target = BytePool(8, num_bytes), BytePool(8, num_bytes)
    contents = [source.fill(block, f"block {block}") for block in range(8)]
    slabs = [target.slab(6), None, target.slab(0), target.slab(1)]
    view = source.run(0, 8)
    offsets = [block * num_bytes for block in (2, 3, 4, 7)]
    digests = copy_blocks(view, address_of(view), offsets, slabs, num_bytes)
    assert [target.read(block) for block in (6, 0, 1)] == [contents[2], contents[4], contents[7]]
    assert not any(target.run(2, 4)) and not any(target.slab(7))
    expected = [xxhash.xxh3_64_intdigest(content) for content in contents]
    assert digests == [expected[2], None, expected[4], expected[7]]
    assert digest_blocks(source.run(1, 4), num_bytes) == expected[1:5]


def test_slabs_that_begin_anywhere(way: str) -> None:
    content = np.random.default_rng(1).integers(0, 256, 4096, np.uint8).tobytes()
    for start in (0, 1, 32, 63):
        room = memoryview(bytearray(4096 + 64))
        view = memoryview(bytes(start) + content)
        slab = room[start : start + 4096]
        assert copy_blocks(view, address_of(view), [start], [slab], 4096) == [digest(slab)]
        assert slab == content and not any(room[:start]) and not any(room[start + 4096 :])


@pytest.mark.parametrize("num_bytes", [64, 1152])
def test_the_digest_sees_every_bit(way: str, num_bytes: int) -> None:
    slab = np.zeros(num_bytes, dtype=np.uint8)
    digests = set(digest_blocks(slab.data, num_bytes))
    for bit in range(8 * num_bytes):
        slab[:] = 0
        slab[bit // 8] = 1 << bit % 8
        digests.update(digest_blocks(slab.data, num_bytes))
    assert len(digests) == 8 * num_bytes + 1


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PATH", str(tmp_path))
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert digest_blocks(memoryview(bytes(512)), 256) == [digest(memoryview(bytes(256)))] * 2
    assert caplog.text.count("no native copies of KV blocks, which are faster: no C++ comp") == 1
