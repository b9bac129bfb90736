"""What a stub worker is told at its birth, and what it tells: JSON lines between processes.

Between the test and the nursery (`tests.faults.nursery`), which forks the workers, and from the
workers themselves (`tests.faults.stub_worker`).
"""

from typing import Final

import msgspec

from common.config import TimerConfig
from common.messages import WorkerInfo

TIMERS: Final = TimerConfig(heartbeat_s=0.4, dead_after=3, lease_s=2.0, stall_s=2.0)
"""Short, and long enough that a busy machine is not taken for a fault."""

STEPS: Final = {
    "prefill": (
        "step", "open", "offer", "close", "welcome", "waiting", "ticket", "ship", "landed", "ack",
    ),
    "decode": ("hello", "begin", "grant", "accept", "land", "closed", "arrive", "step"),
}  # fmt: skip
"""Where a worker can be told to kill itself, before or after it did that."""


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """One life of one worker."""

    name: str
    role: str
    transport: str
    redis: str
    num_blocks: int = 64
    block_size: int = 16
    num_layers: int = 1
    content_id: str = "stub"
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 64
    step_s: float = 0.0
    """What a step takes beside the stub's own work."""
    timers: TimerConfig = TIMERS
    die_at: str = ""
    """One of STEPS and `.before` or `.after`; armed by SIGUSR1."""
    die_after: int = 1
    """How often that must have happened since then."""
    flip: float = 0.0
    """Probability that a bit of a block is flipped on the way to this worker (shm: of each block;
    else of each piece that the proxy reads)."""
    network: dict[str, float] = {}
    """Faults of the proxy before this worker's data address, by the names of its attributes and
    methods. SIGUSR2 begins them, and ends them again."""


class Born(msgspec.Struct, frozen=True, tag="born"):
    """The worker serves."""

    name: str
    info: WorkerInfo


class Armed(msgspec.Struct, frozen=True, tag="armed"):
    """From now on the step at which the worker is to die counts."""

    name: str


class Dying(msgspec.Struct, frozen=True, tag="dying"):
    """The last words of a worker that is about to kill itself."""

    name: str
    step: str


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """`code` as in subprocess: -9 is SIGKILL."""

    name: str
    pid: int
    code: int


Report = Born | Armed | Dying | Ended
