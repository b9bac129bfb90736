"""Which workers serve this router's model: same tokenizer, same weights. Owned by `router.service`.

Deployments of different models may share a registry by mistake, and their tokens may even mean
the same text: what such a worker computes would be an answer of the wrong model.
"""

import logging
from pathlib import Path

from common.config import DTYPES, QUANTIZATIONS
from common.errors import ModelError
from common.identity import content_id
from common.messages import WorkerInfo

log = logging.getLogger(__name__)


def content_ids(directory: Path) -> frozenset[str]:
    """`content_id` of the checkpoint in each dtype and quantization that workers may choose; empty
    if the directory has no weights, only the files that a router needs. Reads a few MiB."""
    try:
        return frozenset(
            content_id(directory, dtype, quantization)
            for dtype in DTYPES
            if dtype != "auto"
            for quantization in QUANTIZATIONS
        )
    except ModelError as error:
        log.info("the weights of workers are not compared with the router's: %s", error)
        return frozenset()


class Membership:
    def __init__(self, text_id: str, content_ids: frozenset[str]) -> None:
        """`content_ids`: see `content_ids`; empty: any."""
        self._text_id = text_id
        self._content_ids = content_ids
        self._refused: set[tuple[str, int]] = set()
        """Workers (id, epoch) that were refused, each logged once."""

    def admits(self, info: WorkerInfo) -> bool:
        if info.text_id != self._text_id:
            self._refuse(info, "its tokenizer files differ from the router's")
            return False
        if self._content_ids and info.content_id not in self._content_ids:
            self._refuse(info, f"its weights ({info.model}) differ from the router's model")
            return False
        return True

    def _refuse(self, info: WorkerInfo, reason: str) -> None:
        if (info.id, info.epoch) not in self._refused:
            self._refused.add((info.id, info.epoch))
            log.error("worker %s is ignored: %s", info.id, reason)
