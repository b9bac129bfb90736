"""Opening a worker: sizes, limits, identities, and what it refuses."""

import dataclasses
from pathlib import Path

import pytest
import torch

from common.config import WorkerConfig
from common.errors import ConfigError
from common.model.worker import MAX_BLOCKS, choose_device, count_blocks, open_worker
from tests.conftest import MakeCheckpoint

REDIS = "redis://127.0.0.1:1"


def config_of(directory: Path, **changes: object) -> WorkerConfig:
    values = {
        "model": str(directory),
        "redis": REDIS,
        "dtype": "float32",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "kv_memory": "1M",
    }
    return WorkerConfig(**(values | changes))  # type: ignore[arg-type]


def test_what_a_worker_says_of_itself(checkpoint: MakeCheckpoint) -> None:
    directory = checkpoint("llama")
    worker = open_worker(config_of(directory, max_num_seqs=5), "prefill", "p1")
    info, limits = worker.info, worker.limits
    spec = worker.runner.spec
    assert worker.pool.num_blocks == info.num_blocks == limits.num_blocks
    assert info.num_blocks == (1 << 20) // worker.pool.block_bytes
    assert (info.id, info.role, info.model) == ("p1", "prefill", str(directory))
    assert info.layout == worker.pool.layout.info() and info.layout.block_size == 16
    assert info.max_model_len == limits.max_model_len == spec.max_position_embeddings
    assert (info.max_num_seqs, limits.max_num_seqs) == (5, 5)
    assert info.eos_token_ids == limits.eos_token_ids == spec.eos_token_ids
    assert info.content_id == limits.content_id and len(info.text_id) == 32
    again = open_worker(config_of(directory, kv_blocks=7, max_model_len=50), "decode", "d1")
    assert (again.info.num_blocks, again.info.max_model_len) == (7, 50)
    assert again.info.content_id == info.content_id and again.info.epoch != info.epoch


def test_pool_of_a_given_or_free_size(checkpoint: MakeCheckpoint) -> None:
    worker = open_worker(config_of(checkpoint("llama")), "prefill", "p1")
    layout, cpu = worker.pool.layout, torch.device("cpu")
    small = config_of(Path(), kv_memory=f"{3 * layout.block_bytes}")
    assert count_blocks(small, layout, cpu) == 3
    assert count_blocks(config_of(Path(), kv_memory="1T"), layout, cpu) == MAX_BLOCKS
    assert count_blocks(dataclasses.replace(small, kv_memory=None), layout, cpu) > 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "--model"),
        ({"redis": None}, "--redis"),
        ({"kv_memory": "1"}, "hold no block"),
        ({"max_model_len": 1 << 20}, "--max-model-len"),
        ({"device": "tpu"}, "--device"),
        ({"device": "meta"}, "--device"),
    ],
)
def test_refusals(checkpoint: MakeCheckpoint, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_worker(config_of(checkpoint("llama"), **changes), "prefill", "p1")


def test_device_names() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
