"""What is known of one block of the KV pool. Used by `common.kv.blocks` alone."""

from dataclasses import dataclass
from enum import Enum

from common.blockhash import BlockHash


class State(Enum):
    """Where a block is in its life; the arrows are drawn in `common.kv.blocks`."""

    FREE = "free"
    FILLING = "filling"
    SEALED = "sealed"
    RECEIVING = "receiving"
    DRAINING = "draining"


HOLDABLE = (State.FILLING, State.SEALED)


@dataclass(slots=True)
class Block:
    state: State = State.FREE
    refs: int = 0
    """Sequences that use it."""
    leases: int = 0
    """Transfers that read it."""
    generation: int = 0
    """Rises on every exit from FREE."""
    hash: BlockHash | None = None
    """Set while SEALED."""

    @property
    def is_held(self) -> bool:
        return self.refs > 0 or self.leases > 0

    @property
    def place(self) -> str:
        """The part of the ledger that counts it."""
        if self.state not in HOLDABLE:
            return self.state.value
        return "in_use" if self.refs else "leased" if self.leases else "cached"

    def check(self) -> None:
        """Assert what must hold of one block alone."""
        assert self.refs >= 0 and self.leases >= 0, self
        assert self.state in HOLDABLE or not self.is_held, self
        assert self.state is not State.FILLING or self.is_held, self
        assert (self.hash is not None) == (self.state is State.SEALED), self
        assert self.generation > 0 or self.state is State.FREE, self
