"""What a worker's engine thread and its I/O thread say to each other about KV transfers.

The engine thread owns the block manager. The I/O thread works on blocks that it was handed
(offers of the sender, grants of the receiver) and gives every grant back exactly once. Commands
and events are queued in order; a transfer is named by its `Key` on both sides.

Sender (the worker that prefilled)            Receiver (the worker that decodes)
  engine -> I/O: Open, Offer*, Close, Abort      I/O -> engine: Wanted, Arrived, Returned
  I/O -> engine: Ticketed, Delivered, Broken     engine -> I/O: Grant | Wait | Refuse, Revoke

A fetch is a transfer that its receiver asked for, without first tokens:

Owner (sender)                                Fetcher (receiver)
  I/O -> engine: Requested                       engine -> I/O: Fetch, EndFetch
  engine -> I/O: Open, Offer, Close | Decline    I/O -> engine: Wanted ... | Declined
"""

from dataclasses import dataclass
from typing import NamedTuple

from common.messages import Peer, TokenLogprob


class Key(NamedTuple):
    """One placement of one request."""

    request: int
    attempt: int


class BlockRef(NamedTuple):
    """A block to ship: position in the prompt, block of the sender's pool, tokens in it."""

    position: int
    block: int
    fill: int


class Slot(NamedTuple):
    """A reserved block of the receiver: position in the prompt, block, generation."""

    position: int
    block: int
    generation: int


class First(NamedTuple):
    """The first token of a choice, sampled by the prefill worker."""

    choice: int
    token: int
    logprob: TokenLogprob | None
    cached_tokens: int = -1
    """Tokens of the prompt that the prefill worker's cache held; -1: not known."""


# ------------------------------------------------------------ sender: engine -> I/O


@dataclass(frozen=True, slots=True)
class Open:
    """The first chunk of this prompt is scheduled: ask `peer` for a ticket."""

    key: Key
    peer: Peer
    num_tokens: int
    """Tokens whose KV the receiver needs."""


@dataclass(frozen=True, slots=True)
class Offer:
    """These blocks are complete and stay unchanged until Delivered or Broken."""

    key: Key
    blocks: tuple[BlockRef, ...]


@dataclass(frozen=True, slots=True)
class Close:
    """Everything was offered; the receiver continues after these first tokens."""

    key: Key
    first: tuple[First, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop the transfer and tell the receiver. Answered by nothing: the key is forgotten. The
    blocks may be read until the endpoint has carried this out."""

    key: Key
    reason: str


# ------------------------------------------------------------ sender: I/O -> engine


@dataclass(frozen=True, slots=True)
class Ticketed:
    """The receiver reserved its slots; `wanted` blocks will be shipped."""

    key: Key
    wanted: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """The receiver has everything and took over: the sender's blocks may be released."""

    key: Key
    blocks: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Broken:
    """The transfer is over without success and its blocks are not read any more: release them.

    reason: `refused` (`detail`: what the receiver said), `stalled`, `incomplete`, `lease` (not
    renewed), `peer` (lost), `reset` (of this endpoint).
    """

    key: Key
    reason: str
    detail: str


# ------------------------------------------------------------ receiver: I/O -> engine


@dataclass(frozen=True, slots=True)
class Wanted:
    """A sender asks for slots for this prompt. Repeated until answered; idempotent."""

    key: Key
    source: Peer
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """Every granted slot was filled and verified; the grant is given back."""

    key: Key
    first: tuple[First, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Returned:
    """The grant is given back unfinished: `landed` (positions) were filled and verified.

    Follows a Revoke, or comes by itself when the transfer failed (`reason`: `revoked`, `aborted`,
    `finished`, `stalled`, `peer`, `incomplete`, `reset`). Nothing writes to the slots any more.
    Also sent, with nothing landed, for a key that was Wanted and got no Grant yet; a Grant that
    crosses it has been answered by it. Each key ends in one Arrived, Returned or Refuse.
    """

    key: Key
    landed: tuple[int, ...]
    reason: str


# ------------------------------------------------------------ receiver: engine -> I/O


@dataclass(frozen=True, slots=True)
class Grant:
    """Write the blocks of this prompt that are still missing into these slots."""

    key: Key
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """No blocks yet; a Grant or a Refuse follows later."""

    key: Key


@dataclass(frozen=True, slots=True)
class Refuse:
    """No slots will be given: `gone` (unknown or ended attempt), `no_blocks`, `draining`."""

    key: Key
    reason: str


@dataclass(frozen=True, slots=True)
class Revoke:
    """End the grant; answered by Returned (also when it is already on its way back)."""

    key: Key


# ------------------------------------------------------------ fetches


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask `peer` for the longest prefix that it holds of the chain `hashes` (16 bytes for each unit
    of 16 tokens). Answered by a Wanted of this key, or by Declined."""

    key: Key
    peer: Peer
    hashes: bytes


@dataclass(frozen=True, slots=True)
class EndFetch:
    """Do not ask (any more); answered by nothing. What the owner has begun is to be refused."""

    key: Key


@dataclass(frozen=True, slots=True)
class Declined:
    """The owner sends nothing: `gone`, `busy`, `draining`, `peer` (it cannot be reached), or why it
    does not exchange blocks with us."""

    key: Key
    reason: str


@dataclass(frozen=True, slots=True)
class Requested:
    """A worker asks for a prefix; see Fetch. Repeated until answered; idempotent."""

    key: Key
    peer: Peer
    hashes: bytes


@dataclass(frozen=True, slots=True)
class Decline:
    """Nothing is sent for this Requested."""

    key: Key
    peer: Peer
    reason: str


SenderCommand = Open | Offer | Close | Abort | Fetch | EndFetch
SenderEvent = Ticketed | Delivered | Broken | Declined
ReceiverCommand = Grant | Wait | Refuse | Revoke | Decline
ReceiverEvent = Wanted | Arrived | Returned | Requested
