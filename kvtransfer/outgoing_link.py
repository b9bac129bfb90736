"""A sender's link to one life of one receiver: whether it is there, and whose turn it is.

    DOWN --connected--> GREETING --Welcome--> UP --disconnected--> DOWN

Given up when it is not UP for too long; until then its transfers wait for the connection to come
back. Used by `Sender` alone.
"""

from collections import deque
from dataclasses import dataclass, field

from common.errors import ProtocolError
from common.messages import KvLayoutInfo, Peer
from kvtransfer.commands import Key
from kvtransfer.cutting import Cutting
from kvtransfer.outgoing import Cut, Outgoing
from kvtransfer.protocol import RUN_BLOCKS, RUN_BYTES, Welcome, Wire
from kvtransfer.timers import Timers


@dataclass(slots=True, eq=False)
class Asking:
    """A fetch that was not answered yet."""

    hashes: bytes
    asked_at: float = float("-inf")


@dataclass(slots=True, eq=False)
class OutgoingLink:
    """Times are of the caller's monotonic clock."""

    peer: Peer
    down_since: float
    connected: bool = False
    up: bool = False
    was_up: bool = False
    hello_at: float = float("-inf")
    window: int = 0
    wire: Wire | None = None
    cutting: Cutting | None = None
    """How the receiver's blocks are made of ours; None until it said Welcome."""
    data: dict[str, str] = field(default_factory=dict)
    """Data addresses of the receiver, by transport."""
    progress_at: float = float("-inf")
    moved_at: float = float("-inf")
    """When a block of any transfer landed last."""
    stalled_at: float = float("-inf")
    """When a transfer was last given up since nothing landed: the data connection may have been
    lost without a word."""
    used_at: float = 0.0
    transfers: dict[int, Outgoing] = field(default_factory=dict)
    fetches: dict[Key, Asking] = field(default_factory=dict)
    """What is asked of this peer, as an owner of prefixes."""
    ring: deque[Outgoing] = field(default_factory=deque)
    """Transfers that may have something to ship, in the order of their turns."""

    # ------------------------------------------------------------ the connection

    def lower(self, connected: bool, now: float) -> None:
        """The connection is new (greet again) or gone."""
        if self.up:
            self.down_since = now
        self.connected, self.up = connected, False

    def welcome(self, message: Welcome, layout: KvLayoutInfo, block_bytes: int) -> str:
        """Raise the link; returns why that cannot be, or nothing. `layout`, `block_bytes`: of the
        blocks that are sent."""
        if (message.id, message.epoch) != (self.peer.id, self.peer.epoch):
            return f"{message.id}@{message.epoch} answers for {self.peer.id}@{self.peer.epoch}"
        try:
            self.cutting = Cutting.of(layout, block_bytes, message.wire)
        except ProtocolError as error:
            return str(error)
        self.wire = message.wire
        for transfer in self.transfers.values():
            self.shape(transfer)
        self.connected = self.up = self.was_up = True
        self.window = message.window
        self.data = message.data
        return ""

    def shape(self, transfer: Outgoing) -> None:
        """Tell a transfer what the receiver's blocks look like, as far as that is known."""
        transfer.cutting, transfer.wire = self.cutting, self.wire

    def needs_hello(self, now: float, timers: Timers) -> bool:
        return self.connected and not self.up and now - self.hello_at >= timers.resend_s

    def is_lost(self, now: float, timers: Timers) -> bool:
        if self.up:
            return False
        if self.connected:
            # Whoever accepts connections may be busy; whoever does not is gone.
            limit = timers.stall_s
        else:
            limit = timers.grace_s if self.was_up else timers.connect_s
        return now - self.down_since > limit

    # ------------------------------------------------------------ data

    def enlist(self, transfer: Outgoing) -> None:
        """Give a transfer its turns as long as it has something to ship."""
        if (transfer.queued or transfer.fence) and transfer not in self.ring:
            self.ring.append(transfer)

    def next_cut(self, now: float, places: int | None = None) -> Cut | None:
        """The next data message, round-robin over the transfers: at most RUN_BYTES and what the
        window leaves, made of at most `places` blocks of this side."""
        for _ in range(len(self.ring) if self.up else 0):
            transfer = self.ring.popleft()
            cut = None
            if transfer.queued:
                count = min(len(transfer.queued), self._room())
                if count > 0:
                    cut = transfer.cut(count, now, places)
            elif transfer.fence:
                cut = transfer.cut_fence()
            self.enlist(transfer)
            if cut is not None:
                return cut
        return None

    def _room(self) -> int:
        """Blocks that the next message may have; at least one if nothing is under way."""
        assert self.cutting is not None
        block_bytes = self.cutting.block_bytes
        outstanding = sum(len(transfer.sent) for transfer in self.transfers.values())
        room = self.window // block_bytes - outstanding
        if not outstanding:
            room = max(1, room)
        # Each piece of a block that is cut may be named in the header.
        most = RUN_BLOCKS if self.cutting.is_whole else max(1, RUN_BLOCKS // self.cutting.pieces)
        return min(room, most, max(1, RUN_BYTES // block_bytes))
