"""A worker's description, for tests that need one without a worker."""

from typing import Any

import msgspec

from common.messages import KvLayoutInfo, WorkerInfo


def worker_info(id: str = "decode-0", **changes: Any) -> WorkerInfo:
    """A plausible worker; `changes` replace fields of WorkerInfo, or `block_size`."""
    block_size = changes.pop("block_size", 16)
    info = WorkerInfo(
        id=id,
        epoch=1,
        role="decode",
        pid=1,
        address="tcp://127.0.0.1:1",
        kv_address="tcp://127.0.0.1:2",
        metrics_url="http://127.0.0.1:3/metrics",
        model="tiny",
        content_id="c0",
        text_id="t0",
        layout=KvLayoutInfo(
            block_size=block_size, num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32"
        ),
        vocab_size=256,
        max_model_len=1024,
        num_blocks=64,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        eos_token_ids=(2,),
    )
    return msgspec.structs.replace(info, **changes)
