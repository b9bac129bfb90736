"""The model half of a worker: weights, KV pool, limits, and what it says of itself.

Called once at the start by `prefill.worker` and `decode.worker`.
"""

import logging
import os
import sys
from dataclasses import dataclass
from typing import Final

import torch

from common.config import WorkerConfig
from common.errors import ConfigError
from common.host import new_epoch
from common.identity import content_id, text_id
from common.kv.layout import KvLayout
from common.kv.memory import free_memory_bytes, num_blocks_for, parse_memory
from common.kv.pool import KvPool
from common.kv.stage import KvStage
from common.messages import WorkerInfo
from common.metrics import WorkerMetrics
from common.model.guides import Guides
from common.model.load import open_model
from common.model.runner import ModelRunner
from common.schedule import Limits

log = logging.getLogger("tandem.worker")

FREE_FRACTION: Final = 0.5
"""Of the free memory, the part that a pool of no given size takes."""
MAX_BLOCKS: Final = 1 << 16
"""More blocks than this are only made on demand (--kv-blocks): their bookkeeping costs too."""
BLOCK_SIZES: Final = {"cpu": 16, "cuda": 64}
SWITCH_INTERVAL_S: Final = 0.0005
"""The I/O thread waits at most this long for the interpreter."""


@dataclass(frozen=True, slots=True)
class Worker:
    """Everything that a worker is before its sockets are bound."""

    runner: ModelRunner
    pool: KvPool
    memory: KvPool | KvStage
    """What transports send from and receive into: the pool, or slots before it."""
    limits: Limits
    info: WorkerInfo
    """Without addresses."""
    metrics: WorkerMetrics


def open_worker(config: WorkerConfig, role: str, name: str) -> Worker:
    """Load the model and allocate the pool. Raises ConfigError in one line."""
    if config.model is None:
        raise ConfigError("--model is missing")
    if config.redis is None:
        raise ConfigError("--redis is missing: routers find this worker through it")
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    device = choose_device(config.device)
    loaded = open_model(config.model, config.revision, config.dtype, device, config.quantize)
    spec = loaded.spec
    block_size = config.block_size or BLOCK_SIZES[device.type]
    layout = spec.layout(block_size, loaded.dtype_name)
    num_blocks = config.kv_blocks or count_blocks(config, layout, device)
    pool = KvPool(layout, num_blocks, device)
    max_model_len = config.max_model_len or spec.max_position_embeddings
    if max_model_len > spec.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than the {spec.max_position_embeddings} "
            f"positions of {config.model}"
        )
    content = content_id(loaded.directory, loaded.dtype_name, config.quantize)
    limits = Limits(
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=spec.eos_token_ids,
        content_id=content,
    )
    info = WorkerInfo(
        id=name,
        epoch=new_epoch(),
        role=role,
        pid=os.getpid(),
        address="",
        kv_address="",
        metrics_url="",
        model=config.model,
        content_id=content,
        text_id=text_id(loaded.directory, None),
        layout=layout.info(),
        vocab_size=spec.vocab_size,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        eos_token_ids=spec.eos_token_ids,
    )
    guides = Guides(loaded.directory, spec.vocab_size, spec.eos_token_ids)
    runner = ModelRunner(spec, loaded.weights, pool, guides=guides)
    memory: KvPool | KvStage = pool
    if device.type != "cpu" or config.stage_kv:
        memory = KvStage(pool, parse_memory(config.stage_memory))
        log.info("KV blocks go through %d slots of host memory", memory.num_slots)
    return Worker(runner, pool, memory, limits, info, WorkerMetrics(role))


def choose_device(name: str) -> torch.device:
    """The one device of a worker. Raises ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is not cpu, cuda or cuda:N") from error
    if device.type not in BLOCK_SIZES:
        raise ConfigError(f"--device {name!r} is not cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: there is no CUDA device")
    return device


def count_blocks(config: WorkerConfig, layout: KvLayout, device: torch.device) -> int:
    """Blocks of a pool whose size was not given in blocks."""
    if config.kv_memory is not None:
        num_bytes = parse_memory(config.kv_memory)
    else:
        cuda = device.type == "cuda"
        free = torch.cuda.mem_get_info(device)[0] if cuda else free_memory_bytes()
        num_bytes = int(free * FREE_FRACTION)
    num_blocks = num_blocks_for(layout, num_bytes)
    if num_blocks > MAX_BLOCKS:
        log.info("memory for %d blocks, using %d (--kv-blocks for more)", num_blocks, MAX_BLOCKS)
    return min(num_blocks, MAX_BLOCKS)
