"""One transfer as its receiver sees it, and the sender that it comes from. Used by `Receiver`.

WANTED --Wait--> WAITING          the engine has not answered / has no blocks yet
   \\---Grant---/--> GRANTED      slots may be written; rounds repeat what is missing
any state --failure, Revoke, AbortTransfer--> ENDING, until no copy is under way, then gone
"""

from dataclasses import dataclass, field
from enum import Enum, auto

from common.messages import Peer
from kvtransfer.commands import First, Key, Slot
from kvtransfer.protocol import DataBlock, DataHeader


class State(Enum):
    WANTED = auto()
    WAITING = auto()
    GRANTED = auto()
    ENDING = auto()


@dataclass(slots=True, eq=False)
class Incoming:
    """State of one transfer. Times are of the caller's monotonic clock."""

    key: Key
    id: int
    source: "Source"
    num_tokens: int
    num_blocks: int
    begun_at: float
    """When the sender last asked for a ticket."""
    is_owed: bool = True
    """It was not answered yet."""
    state: State = State.WANTED
    slots: dict[int, Slot] = field(default_factory=dict)
    secret: bytes = b""
    round: int = 0
    fenced_round: int = 0
    """The last round whose fence was seen: what is missing of it is lost."""
    landed: set[int] = field(default_factory=set)
    writing: set[int] = field(default_factory=set)
    """Positions that are being copied at this moment."""
    first: tuple[First, ...] | None = None
    moved_at: float = 0.0
    """When the ticket was given, the first tokens came, or a block landed last."""
    reason: str = ""
    """Why it is ENDING."""

    def missing(self) -> list[int]:
        return sorted(self.slots.keys() - self.landed - self.writing)

    @property
    def is_complete(self) -> bool:
        return self.first is not None and len(self.landed) == len(self.slots)

    def fill(self, position: int, block_size: int) -> int:
        """Tokens in the block at `position`."""
        return min(block_size, self.num_tokens - position * block_size)

    def objection(self, block: DataBlock, block_size: int) -> str:
        """Why this block must not be written, by the name of the check; empty if it may."""
        slot = self.slots.get(block.position)
        if slot is None:
            return "position"
        if (slot.block, slot.generation) != (block.slot, block.generation):
            return "generation"
        if block.position in self.landed or block.position in self.writing:
            return "landed"
        if block.fill != self.fill(block.position, block_size):
            return "fill"
        return ""


@dataclass(slots=True, eq=False)
class Source:
    """One life of one sender. `route` is where its answers go; it changes when it reconnects."""

    peer: Peer
    route: bytes
    heard_at: float
    lost_at: float | None = None
    """Since when it is thought to be gone; any message of it shows that it is not."""
    steps: int = -1
    step_s: float = 0.0
    stepped_at: float = float("-inf")
    moved_at: float = float("-inf")
    """When a block of any transfer landed last: the path works, slow is no stall."""
    renewal: int = 0
    renewed_at: float = float("-inf")
    transfers: dict[int, Incoming] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Landing:
    """Permission to write the blocks of one data message.

    `slots[i]` is the pool block for `header.blocks[i]`, None for one that must be skipped.
    Every landing is given back by `Receiver.landed`; until then its slots stay granted.
    """

    transfer: Incoming
    header: DataHeader
    slots: tuple[int | None, ...]

    @property
    def is_over(self) -> bool:
        """The transfer has ended: its grant waits for this landing to be given back."""
        return self.transfer.state is State.ENDING
