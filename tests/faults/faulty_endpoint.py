"""A transfer endpoint with faults in its data path: a proxy before its address (tcp, zmq), or a
hook between header and copy (shm, where no proxy fits)."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from queue import SimpleQueue
from random import Random

from common.config import TimerConfig
from kvtransfer import shm_transport
from kvtransfer.endpoint import Endpoint
from kvtransfer.identity import EndpointIdentity
from kvtransfer.memory import BlockMemory
from kvtransfer.stats import TransferStats
from tests.faults.spec import Spec
from tests.kvtransfer.proxy import Proxy


@dataclass(slots=True)
class FaultyStats(TransferStats):
    injected: Counter[str] = field(default_factory=Counter)
    """Faults that really happened, by name; shown by /metrics with the other counters."""


class FaultyEndpoint(Endpoint):
    """`spec` says which faults this worker's own data addresses have."""

    def __init__(
        self,
        spec: Spec,
        identity: EndpointIdentity,
        memory: BlockMemory,
        inbox: "SimpleQueue[object]",
        timers: TimerConfig,
    ) -> None:
        super().__init__(identity, memory, inbox, timers, "127.0.0.1", spec.transport)
        self._spec = spec
        self._proxy: Proxy | None = None
        self._harmed = False
        self._injected: Counter[str] = Counter()

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        await super().start()
        spec = self._spec
        if spec.transport == "shm":
            if spec.flip:
                # The module's own name for it: the hook is between header and copy.
                plain: Copy = vars(shm_transport)["copy_block"]
                vars(shm_transport)["copy_block"] = flipping(plain, spec.flip, self._injected)
        elif spec.flip or spec.network:
            addresses = self._receiver.data
            self._proxy = Proxy(addresses[spec.transport], seed=self._sender.identity.epoch)
            self._proxy.flip = spec.flip
            await self._proxy.start()
            self._receiver.data = {spec.transport: self._proxy.address}

    def toggle(self) -> None:
        """Begin the faults of `spec.network`, or end them. In the loop."""
        assert self._proxy is not None
        self._harmed = not self._harmed
        for name, value in self._spec.network.items():
            plain = getattr(self._proxy, name)
            if not callable(plain):
                setattr(self._proxy, name, type(plain)(value if self._harmed else 0))
            elif self._harmed:
                plain()

    async def close(self) -> None:
        if self._proxy is not None:
            await self._proxy.close()
        await super().close()

    def stats(self) -> FaultyStats:
        plain = super().stats()
        counts = {f.name: getattr(plain, f.name) for f in fields(plain)}
        injected = self._injected if self._proxy is None else self._proxy.happened
        return FaultyStats(**counts, injected=injected.copy())


Copy = Callable[[memoryview, memoryview], int]


def flipping(copy: Copy, probability: float, injected: "Counter[str]") -> Copy:
    """A copy that sometimes finds a flipped bit in the sender's memory."""
    random = Random(1)

    def damaged(source: memoryview, target: memoryview) -> int:
        if random.random() >= probability:
            return copy(source, target)
        injected["flipped"] += 1
        found = bytearray(source)
        found[random.randrange(len(found))] ^= 1 << random.randrange(8)
        return copy(memoryview(found), target)

    return damaged
