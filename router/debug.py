"""What the router and its workers hold, for operators and tests: `/debug/...`."""

from dataclasses import asdict
from typing import Any, Final

import msgspec

from common.messages import Ledger
from router.service import Service

INSPECT_S: Final = 3.0
"""How long the workers may take to answer."""
_SUMMED: Final = (
    "num_blocks", "free", "cached", "in_use", "leased", "receiving", "draining", "running",
)  # fmt: skip


def workers(service: Service) -> dict[str, Any]:
    """The live workers: who they are, how loaded, and what their like say that steps cost."""
    return {
        "workers": [
            {
                "id": member.info.id,
                "role": member.info.role,
                "pid": member.info.pid,
                "url": member.info.metrics_url,
                "epoch": member.info.epoch,
                "state": member.state,
                "model": member.info.model,
                "num_blocks": member.info.num_blocks,
                "block_size": member.info.layout.block_size,
                "token_bytes": member.info.layout.token_bytes,
                "max_num_seqs": member.info.max_num_seqs,
                "max_num_batched_tokens": member.info.max_num_batched_tokens,
                "costs": asdict(member.meter.said),
                "load": {
                    "running": member.load.running,
                    "waiting": member.load.waiting,
                    "prefill_tokens": member.load.prefill_tokens,
                    "kv_tokens": member.load.kv_tokens,
                    "free_blocks": member.load.free_blocks,
                },
            }
            for member in service.fleet
        ]
    }


async def ledger(service: Service) -> dict[str, Any]:
    """The block ledger of each worker, by id, and their sum (`total`).

    A worker that does not answer in time is listed with an error, and the sum is not balanced.
    """
    ledgers = await service.ledgers(INSPECT_S)
    rows: dict[str, dict[str, Any]] = {}
    for worker, answer in ledgers.items():
        member = service.fleet.get(worker)
        row: dict[str, Any] = {"role": member.info.role if member else None}
        if answer is None:
            row |= {"error": "no answer", "balanced": False}
        else:
            row |= msgspec.structs.asdict(answer)
        rows[worker] = row
    known = [answer for answer in ledgers.values() if answer is not None]
    total: dict[str, Any] = {name: _sum(known, name) for name in _SUMMED}
    total["balanced"] = all(row["balanced"] for row in rows.values())
    return {"workers": rows, "total": total, "live_requests": service.num_live}


def _sum(ledgers: list[Ledger], name: str) -> int:
    return sum(int(getattr(ledger, name)) for ledger in ledgers)
