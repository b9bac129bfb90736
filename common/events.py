"""What the engine thread and the I/O thread of a worker say to each other.

`common.host` puts the first group into the engine's inbox; engines leave the second group in
their outbox. Events and commands of KV transfers are those of `kvtransfer.commands`.
"""

from dataclasses import dataclass, field
from typing import Any

from common.blockhash import BlockHash
from common.cost import Costs
from common.messages import Load, ToRouter, ToWorker

AttemptId = tuple[int, int]
"""(request, attempt); equal to the `Key` that names its transfer."""


# ------------------------------------------------------------ into the engine


@dataclass(frozen=True, slots=True)
class FromRouter:
    """`message` came from the router with this link identity."""

    router: bytes
    message: ToWorker
    at: float = 0.0
    """Monotonic seconds when it came."""


@dataclass(frozen=True, slots=True)
class RouterGone:
    """The link to this router closed or fell silent: nobody waits for its requests."""

    router: bytes


@dataclass(frozen=True, slots=True)
class Drain:
    """Accept nothing new, finish what is held, at the latest in `within_s`."""

    within_s: float


@dataclass(frozen=True, slots=True)
class Reset:
    """This process was paused past its lease: all that it held before is void."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """The I/O thread handled everything that was posted before `Fence(attempt)`."""

    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class Crashed:
    """The I/O thread cannot go on; the engine loop raises `error`."""

    error: BaseException


# ------------------------------------------------------------ out of the engine


@dataclass(frozen=True, slots=True)
class Send:
    router: bytes
    message: ToRouter


@dataclass(frozen=True, slots=True)
class Ship:
    """A command for the KV transfer endpoint (`kvtransfer.commands`, opaque to this package)."""

    command: Any


@dataclass(frozen=True, slots=True)
class Publish:
    """Blocks that became matchable and blocks that are not any more."""

    stored: list[BlockHash]
    evicted: list[BlockHash]


@dataclass(frozen=True, slots=True)
class Announce:
    """All matchable blocks, after a reset: the new epoch is registered with them."""

    hashes: list[BlockHash]


@dataclass(frozen=True, slots=True)
class Draining:
    """Tell routers and registry that nothing new is accepted."""


@dataclass(frozen=True, slots=True)
class Fence:
    """Answer `Fenced` once everything posted before was handled."""

    attempt: AttemptId


Outgoing = Send | Ship | Publish | Announce | Draining | Fence


@dataclass(frozen=True, slots=True)
class Status:
    """What the I/O thread tells of the engine without asking it."""

    steps: int = 0
    load: Load = field(default_factory=Load)
    busy: bool = False
    """A step is being computed."""
    state: str = "ready"
    step_s: float = 0.0
    """How long a step may be predicted to take, from the longest of late."""
    costs: Costs = field(default_factory=Costs)
    """What its steps were measured to cost."""
