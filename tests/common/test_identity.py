"""Identities change with everything that matters and with nothing else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.errors import ModelError
from common.identity import SAMPLE_BYTES, TEXT_FILES, content_id, text_id
from common.shards import INDEX, SINGLE, read_shard

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two shards, one smaller and one larger than what is sampled, and a tokenizer."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    rng = np.random.default_rng(3)
    small = {"a": rng.standard_normal((4, 8), np.float32)}
    large = {"b": rng.integers(0, 255, 5 * SAMPLE_BYTES, np.uint8)}
    for name, tensors in zip(SHARDS, (small, large), strict=True):
        save_file(tensors, directory / name)
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    (directory / INDEX).write_text(json.dumps(index))
    (directory / "config.json").write_text('{"model_type": "llama", "limit": Infinity}')
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file in place; a negative offset counts from its end."""
    with path.open("r+b") as file:
        file.seek(offset, 0 if offset >= 0 else 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


# ---------------------------------------------------------------- content


def test_a_copy_has_the_same_content(checkpoint: Path, tmp_path: Path) -> None:
    first = content_id(checkpoint, "bfloat16")
    assert len(bytes.fromhex(first)) == 16
    copy = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    (copy / "README.md").write_text("other words")
    (copy / "tokenizer.json").write_text("{}")
    assert content_id(copy, "bfloat16") == first


def test_content_depends_on_the_kv_dtype(checkpoint: Path) -> None:
    ids = {content_id(checkpoint, dtype) for dtype in ("bfloat16", "float16", "float32")}
    assert len(ids) == 3


def test_content_depends_on_the_configuration(checkpoint: Path) -> None:
    before = content_id(checkpoint, "float32")
    (checkpoint / "config.json").write_text('{"model_type": "llama", "rope_theta": 1e6}')
    assert content_id(checkpoint, "float32") != before


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("where", ["first", "last"])
def test_content_depends_on_the_weights(checkpoint: Path, shard: str, where: str) -> None:
    before = content_id(checkpoint, "float32")
    path = checkpoint / shard
    flip(path, read_shard(path).data_start if where == "first" else -1)
    assert content_id(checkpoint, "float32") != before


def test_content_depends_on_every_byte_of_a_small_shard(checkpoint: Path) -> None:
    path = checkpoint / SHARDS[0]
    start = read_shard(path).data_start
    ids = {content_id(checkpoint, "float32")}
    for offset in range(0, 128, 16):
        flip(path, start + offset)
        ids.add(content_id(checkpoint, "float32"))
    assert len(ids) == 9


def test_one_mebibyte_of_a_large_shard_is_sampled_all_over(checkpoint: Path) -> None:
    """A change of 400 KiB anywhere is seen: windows are 341 KiB apart, 64 KiB wide."""
    path = checkpoint / SHARDS[1]
    shard = read_shard(path)
    before = content_id(checkpoint, "float32")
    whole = path.read_bytes()
    width = 400 * 1024
    for start in range(shard.data_start, len(whole) - width, 300_000):
        path.write_bytes(whole[:start] + bytes(width) + whole[start + width :])
        assert content_id(checkpoint, "float32") != before, start


def test_content_depends_on_names_and_headers(checkpoint: Path, tmp_path: Path) -> None:
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(checkpoint / "config.json", single)
    tensor = np.ones((4, 8), np.float32)
    ids = set()
    for tensors in ({"a": tensor}, {"b": tensor}, {"a": tensor.reshape(8, 4)}):
        save_file(tensors, single / SINGLE)
        ids.add(content_id(single, "float32"))
    (single / SINGLE).rename(single / "renamed.safetensors")
    (single / INDEX).write_text(json.dumps({"weight_map": {"a": "renamed.safetensors"}}))
    ids.add(content_id(single, "float32"))
    assert len(ids) == 4


def test_content_of_an_incomplete_checkpoint(checkpoint: Path) -> None:
    (checkpoint / SHARDS[1]).unlink()
    with pytest.raises(ModelError, match=f"^checkpoint file .*/{SHARDS[1]} is missing$"):
        content_id(checkpoint, "float32")
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(
        ModelError, match=r"^checkpoint file .*/config\.json is corrupt: not valid JSON \(.*\)$"
    ):
        content_id(checkpoint, "float32")
    (checkpoint / "config.json").unlink()
    with pytest.raises(ModelError, match=r"^checkpoint file .*/config\.json is missing$"):
        content_id(checkpoint, "float32")


def test_content_of_a_truncated_checkpoint(checkpoint: Path) -> None:
    path = checkpoint / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is corrupt or truncated: "):
        content_id(checkpoint, "float32")


# ---------------------------------------------------------------- text


def test_a_copy_has_the_same_text(checkpoint: Path, tmp_path: Path) -> None:
    first = text_id(checkpoint, None)
    assert len(bytes.fromhex(first)) == 16
    copy = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    (copy / "config.json").write_text("{}")
    (copy / SHARDS[0]).unlink()
    assert text_id(copy, None) == first


@pytest.mark.parametrize("name", TEXT_FILES)
def test_text_depends_on_every_file(checkpoint: Path, name: str) -> None:
    before = text_id(checkpoint, None)
    (checkpoint / name).write_text('{"other": 1}')
    assert text_id(checkpoint, None) != before


def test_text_depends_on_the_template_in_use(checkpoint: Path) -> None:
    ids = [text_id(checkpoint, template) for template in (None, "", "{{ messages }}", "{{ x }}")]
    assert len(set(ids)) == 4
    assert text_id(checkpoint, "{{ x }}") == ids[3]


def test_text_without_a_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"^no tokenizer in .* \(looked for tokenizer\.json, "):
        text_id(checkpoint, None)


def test_text_of_a_corrupt_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").write_bytes(b"\xff\xff")
    with pytest.raises(ModelError, match=r"/tokenizer_config\.json is corrupt: not valid JSON"):
        text_id(checkpoint, None)
    (checkpoint / "tokenizer_config.json").unlink()
    (checkpoint / "tokenizer_config.json").mkdir()
    with pytest.raises(ModelError, match=r"^cannot read .*/tokenizer_config\.json: Is a directory"):
        text_id(checkpoint, None)


def test_identities_need_no_torch() -> None:
    modules = "common.identity, common.kv.blocks, common.kv.memory"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert result.stdout.strip() == "False"
