"""A transfer endpoint with faults in its data path: a proxy before its address (tcp, zmq), or a
hook between header and copy (shm, where no proxy fits)."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from queue import SimpleQueue
from random import Random

from common.config import TimerConfig
from kvtransfer import shm_transport
from kvtransfer.copying import address_of
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
                plain: CopyBlocks = vars(shm_transport)["copy_blocks"]
                vars(shm_transport)["copy_blocks"] = flipping(plain, spec.flip, self._injected)
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


CopyBlocks = Callable[
    [memoryview, int, Sequence[int], Sequence[memoryview | None], int], list[int | None]
]
"""`kvtransfer.copying.copy_blocks`."""


def flipping(copy: CopyBlocks, probability: float, injected: "Counter[str]") -> CopyBlocks:
    """A copy that finds a flipped bit in some of the sender's blocks; the pool itself is not
    harmed."""
    random = Random(1)

    def damaged(
        source: memoryview,
        address: int,
        offsets: Sequence[int],
        slabs: Sequence[memoryview | None],
        block_bytes: int,
    ) -> list[int | None]:
        found = bytearray().join(source[at : at + block_bytes] for at in offsets)
        starts = range(0, len(found), block_bytes)
        for start, slab in zip(starts, slabs, strict=True):
            if slab is not None and random.random() < probability:
                injected["flipped"] += 1
                found[start + random.randrange(block_bytes)] ^= 1 << random.randrange(8)
        view = memoryview(found)
        return copy(view, address_of(view), starts, slabs, block_bytes)

    return damaged
