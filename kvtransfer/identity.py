"""Who a transfer endpoint is, and whether two of them may exchange blocks."""

from dataclasses import dataclass

from msgspec.structs import replace

from common.blockhash import UNIT
from common.messages import KvLayoutInfo, Peer
from kvtransfer.protocol import VERSION, Hello, Refused


@dataclass(frozen=True, slots=True)
class EndpointIdentity:
    """One life of one worker. `epoch` is random and new with every life."""

    id: str
    epoch: int
    content_id: str
    layout: KvLayoutInfo
    curve_key: str = ""
    """Public key of its zmq sockets, if they have one."""

    def hello(self, address: str, transports: tuple[str, ...]) -> Hello:
        """The greeting of this endpoint, whose control socket is at `address`."""
        return Hello(
            version=VERSION,
            source=Peer(self.id, self.epoch, address, self.curve_key),
            content_id=self.content_id,
            layout=self.layout,
            transports=transports,
        )

    def refusal(self, hello: Hello) -> Refused | None:
        """Why blocks of that sender cannot be used here; None if they can."""
        if hello.version != VERSION:
            return Refused("version", f"protocol {hello.version} of the sender, {VERSION} here")
        if hello.content_id != self.content_id:
            return Refused("content", f"content {hello.content_id!r}, {self.content_id!r} here")
        size = hello.layout.block_size
        if replace(hello.layout, block_size=self.layout.block_size) != self.layout:
            return Refused("layout", f"{hello.layout} of the sender, {self.layout} here")
        if size != self.layout.block_size and (size < UNIT or size % UNIT):
            return Refused("layout", f"block size {size} of the sender is no multiple of {UNIT}")
        return None
