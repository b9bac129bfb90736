"""Counters of one transfer endpoint; the worker exports them as metrics."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field


@dataclass(slots=True)
class TransferStats:
    """Monotonic counters since start, and the live transfers at this moment."""

    blocks_sent: int = 0
    bytes_sent: int = 0
    blocks_received: int = 0
    """Landed and verified."""
    bytes_received: int = 0
    digest_errors: int = 0
    delivered: int = 0
    arrived: int = 0
    exposed_s: float = 0.0
    """Of all delivered transfers: from the last computed block (Close of the engine) to the Ack,
    the time that computing did not hide."""
    rounds_repeated: int = 0
    """Tickets of a second or third round: something was lost or damaged on the way."""
    broken: Counter[str] = field(default_factory=Counter)
    """Transfers that failed at the sender, by reason."""
    returned: Counter[str] = field(default_factory=Counter)
    """Grants and requests for one that ended unfinished at the receiver, by reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Messages and blocks from outside that were ignored, by the check that they failed."""
    bytes_sent_over: Counter[str] = field(default_factory=Counter)
    """By transport."""
    bytes_received_over: Counter[str] = field(default_factory=Counter)
    """By transport; divided by the seconds it is the bandwidth of the data path."""
    seconds_receiving_over: defaultdict[str, float] = field(
        default_factory=lambda: defaultdict(float)
    )
    """By transport: time in which data messages were being copied or received."""
    sending: int = 0
    receiving: int = 0
    links: int = 0
    """Receivers that this endpoint holds a connection to."""
    links_over: Counter[str] = field(default_factory=Counter)
    """Data connections to receivers at this moment, by the transport that was chosen."""
    slots: int = 0
    """Host slots that blocks go through where transports cannot reach the pool."""
    slots_taken: int = 0
