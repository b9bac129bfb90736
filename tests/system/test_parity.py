"""Greedy tokens over HTTP, prefilled on one worker and decoded on another, against transformers."""

import pytest

from tests.checkpoints import ARCHITECTURES, Architecture
from tests.client import http
from tests.conftest import MakeCheckpoint
from tests.parity import assert_greedy_equal, assert_teacher_forced
from tests.system.prompts import sixty
from tests.system.serving import complete_all, deployment, settled

pytestmark = pytest.mark.system

OPTIONS: dict[Architecture, dict[str, object]] = {
    "llama": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        }
    },
    "mistral": {"sliding_window": 100},
    "qwen2": {"kv_heads": 1},
    "qwen3": {"head_dim": 32, "heads": 8, "kv_heads": 2},
}
"""Beyond plain GQA with an untied head: what each architecture is known for."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_sixty_prompts(
    checkpoint: MakeCheckpoint, architecture: Architecture, dtype: str
) -> None:
    model = checkpoint(architecture, dtype=dtype, **OPTIONS[architecture])
    prompts = sixty()
    flags = ("--dtype", dtype, "--kv-memory", "128M", "--max-model-len", "4096")
    with deployment(model, *flags, tiny=False) as served:
        async with http(served.url) as client:
            answers = await complete_all(client, prompts, 60, max_tokens=12)
            await settled(client, 15)
    outputs = [answer.ids for answer in answers]
    check = assert_greedy_equal if dtype == "float32" else assert_teacher_forced
    check(model, prompts, outputs)
