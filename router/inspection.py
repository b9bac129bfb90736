"""Asking workers for their block ledgers: `/debug/ledger`. Owned by `router.service`."""

import asyncio
from collections.abc import Sequence

from common.link import RouterLink
from common.messages import Inspect, Inspected, Ledger


class Inspector:
    def __init__(self) -> None:
        self._pending: dict[tuple[str, int], asyncio.Future[Ledger]] = {}
        self._seq = 0

    async def ask(
        self, workers: Sequence[str], link: RouterLink, timeout_s: float
    ) -> dict[str, Ledger | None]:
        """The ledger of each worker; None for one that did not answer in time. A worker that went
        down meanwhile is not listed: nothing of it is left to be counted."""
        self._seq += 1
        seq = self._seq
        loop = asyncio.get_running_loop()
        futures: dict[str, asyncio.Future[Ledger]] = {
            worker: loop.create_future() for worker in workers
        }
        for worker, future in futures.items():
            self._pending[worker, seq] = future
            link.send(worker, Inspect(seq))
        try:
            if futures:
                await asyncio.wait(futures.values(), timeout=timeout_s)
        finally:
            for worker in workers:
                self._pending.pop((worker, seq), None)
        return {
            worker: future.result() if future.done() else None
            for worker, future in futures.items()
            if not future.cancelled()
        }

    def answered(self, worker: str, message: Inspected) -> None:
        future = self._pending.pop((worker, message.seq), None)
        if future is not None:
            future.set_result(message.ledger)

    def lost(self, worker: str) -> None:
        """The worker is down: it will not answer."""
        for key in [key for key in self._pending if key[0] == worker]:
            self._pending.pop(key).cancel()
