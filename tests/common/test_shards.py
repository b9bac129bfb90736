"""Which safetensors files a checkpoint has, and every way in which one can be wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.errors import ModelError
from common.shards import INDEX, SINGLE, read_shard, shard_paths


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_single_file(tmp_path: Path) -> None:
    save_file({"a": np.ones((2, 3), np.float32)}, tmp_path / SINGLE)
    (tmp_path / "adapter.safetensors").write_bytes(b"")
    assert shard_paths(tmp_path) == [tmp_path / SINGLE]


def test_the_index_decides(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(b"")
    write_index(tmp_path, {"x": "m-2.safetensors", "y": "m-1.safetensors", "z": "m-2.safetensors"})
    assert shard_paths(tmp_path) == [tmp_path / "m-1.safetensors", tmp_path / "m-2.safetensors"]


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        shard_paths(tmp_path)
    assert str(error.value) == (
        f"no safetensors weights in {tmp_path} "
        "(looked for model.safetensors and model.safetensors.index.json)"
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}']
)
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ModelError, match="is not a valid safetensors index: ") as error:
        shard_paths(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["../m.safetensors", "/etc/passwd", "a/b.safetensors", "", "..", "config.json", 3, None]
)
def test_an_index_that_points_elsewhere(tmp_path: Path, name: object) -> None:
    write_index(tmp_path, {"x": name})
    with pytest.raises(ModelError, match=r"which is no safetensors file beside it$"):
        shard_paths(tmp_path)


def test_the_header_of_a_shard(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    save_file({"a": np.ones((2, 3), np.float32)}, path, metadata={"format": "pt"})
    shard = read_shard(path)
    assert json.loads(shard.header)["a"] == {
        "dtype": "F32",
        "shape": [2, 3],
        "data_offsets": [0, 24],
    }
    assert shard.data_bytes == 24
    assert path.read_bytes()[shard.data_start :] == np.ones((2, 3), np.float32).tobytes()


def test_a_shard_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / SINGLE)
    assert read_shard(tmp_path / SINGLE).data_bytes == 0


def test_a_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^checkpoint file .*/gone\.safetensors is missing$"):
        read_shard(tmp_path / "gone.safetensors")


def test_a_shard_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(ModelError, match=r"^cannot read checkpoint file .*: Is a directory$"):
        read_shard(tmp_path / SINGLE)


@pytest.mark.parametrize("change", [-1, 1, -23])
def test_a_shard_of_another_size_than_its_header_says(tmp_path: Path, change: int) -> None:
    path = tmp_path / SINGLE
    save_file({"a": np.ones((2, 3), np.float32)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"x")
    with pytest.raises(ModelError, match=r"is corrupt or truncated: .* bytes of data, .* says 24$"):
        read_shard(path)


def frame(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        (100).to_bytes(8, "little") + b"{}",
        b"\xff" * 64,
        frame(b"not json"),
        frame(b"\xff\xfe"),
        frame(b"[1]"),
        frame(b'{"a": {}}'),
        frame(b'{"a": {"data_offsets": [0]}}'),
        frame(b'{"a": {"data_offsets": ["0", "9"]}}'),
        frame(b"[" * 100_000),
    ],
)
def test_a_file_that_is_not_safetensors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(data)
    with pytest.raises(
        ModelError, match=r"^checkpoint file .*/model\.safetensors is corrupt"
    ) as error:
        read_shard(path)
    assert "\n" not in str(error.value)
