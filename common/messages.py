"""Every message between a router and a worker, in both directions (msgpack over ZMQ).

One router talks to one worker over one DEALER (router) / ROUTER (worker) connection. Ids are
minted by the router; nothing here comes from a client unchecked. Messages are idempotent or
carry what is needed to recognise a repetition: `(request, attempt, choice, index)`.
"""

from typing import Final

import msgspec

from common.cost import Costs
from common.errors import ProtocolError
from common.sampling import SamplingParams

VERSION: Final = 4


class Peer(msgspec.Struct, frozen=True, array_like=True):
    """Where a worker's KV transfer endpoint is, and which life of that worker is meant."""

    id: str
    epoch: int
    address: str
    curve_key: str = ""


class KvLayoutInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a worker's KV layout that its peers must know (see `common.kv.layout`)."""

    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    order: str = "block,layer,kv,head,slot,dim"
    first_kv_head: int = 0
    """Of the model's heads, the first of the `num_kv_heads` that are held."""

    @property
    def token_bytes(self) -> int:
        """KV of one token."""
        values = 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return values * (4 if self.dtype == "float32" else 2)


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself, in the registry and at the start of a link."""

    id: str
    epoch: int
    role: str
    """`prefill` or `decode`."""
    pid: int
    address: str
    """ZMQ address of the worker's router link."""
    kv_address: str
    """ZMQ address of the worker's KV transfer endpoint."""
    metrics_url: str
    model: str
    """Path or id that the weights were loaded from."""
    content_id: str
    """Equal only for workers whose KV blocks may be exchanged; seeds the block hashes."""
    text_id: str
    """Identity of tokenizer files and chat template."""
    layout: KvLayoutInfo
    vocab_size: int
    max_model_len: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    eos_token_ids: tuple[int, ...]
    version: int = VERSION
    state: str = "ready"
    """`ready` or `draining`."""
    curve_key: str = ""
    """Public CurveZMQ key of the worker's sockets; empty: they speak in the clear."""


class Load(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker's load, sent with every Pong and with every Step."""

    running: int = 0
    waiting: int = 0
    prefill_tokens: int = 0
    """Prompt tokens that still have to be computed, queued and running."""
    kv_tokens: int = 0
    """Tokens whose KV is held by running sequences."""
    free_blocks: int = 0
    """Blocks that could be handed out now: free and cached."""
    fetch_bps: float = 0.0
    """Bytes per second at which fetched prefixes came in of late; 0: none has yet."""


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """Where every block of a worker's pool is; `balanced` if the parts sum to `num_blocks`."""

    num_blocks: int
    free: int
    cached: int
    in_use: int
    leased: int
    receiving: int
    draining: int
    running: int = 0
    """Sequences that the scheduler holds (running, waiting, being transferred)."""
    balanced: bool = True


# ---------------------------------------------------------------- router -> worker


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """First message of a router on a link; answered by Attached."""

    router: str
    version: int


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Sent every heartbeat interval; answered at once by the I/O thread."""

    seq: int


class FetchFrom(msgspec.Struct, frozen=True, array_like=True):
    """A worker whose cache holds a prefix of the prompt, to be fetched before the rest is
    computed."""

    peer: Peer
    units: int
    """Of 16 tokens, that it is thought to hold; it may hold more, or less by now."""
    within_s: float
    """What is not there by then is computed: later it would save nothing."""


class _Work(msgspec.Struct, frozen=True, kw_only=True):
    request: int
    """64-bit, minted by the router at random, unique over all routers."""
    attempt: int
    """Counts the placements of this request; each placement has its own number."""
    tokens: bytes
    """Prompt and tokens emitted so far, little-endian int32."""
    prompt_len: int
    """Tokens of the original prompt; the rest of `tokens` was emitted by earlier attempts."""
    choices: tuple[int, ...]
    """Choice numbers to generate; more than one only if nothing was emitted yet."""
    params: SamplingParams
    salt: str = ""
    fetch: FetchFrom | None = None
    """For whoever prefills."""


class Prefill(_Work, frozen=True, kw_only=True, tag="prefill"):
    """Compute the KV of `tokens`, sample the first token of each choice, hand over to `decode`.

    `decode` is None when the first token is known to be the last one (max_tokens reached).
    """

    decode: Peer | None = None


class Admit(_Work, frozen=True, kw_only=True, tag="admit"):
    """Expect the KV of `tokens` from `prefill` and continue; None: prefill it yourself."""

    prefill: Peer | None = None


class Cancel(msgspec.Struct, frozen=True, tag="cancel", omit_defaults=True):
    """Forget this attempt, or some of its choices, and free what they hold.

    That of a whole attempt may overtake the work itself.
    """

    request: int
    attempt: int
    choices: tuple[int, ...] = ()
    """Choices that are over while the others go on; empty: all of them."""


class Inspect(msgspec.Struct, frozen=True, tag="inspect"):
    """Ask the engine thread for its ledger; answered by Inspected."""

    seq: int


# ---------------------------------------------------------------- worker -> router


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    info: WorkerInfo


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    seq: int
    epoch: int
    steps: int
    """Engine steps since start: rises while the engine makes progress."""
    load: Load
    busy: bool = False
    """The engine has work; with `steps` standing still this means that it hangs."""
    state: str = "ready"
    costs: Costs = Costs()


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the most likely tokens, best first."""
    rank: int = 0
    """1 for the most likely token, of tokens of a prompt; 0: not counted."""


class Output(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one choice. `index` is the output index of `tokens[0]` (0 is the first)."""

    request: int
    attempt: int
    choice: int
    index: int
    tokens: tuple[int, ...]
    finish: str = ""
    """Empty, `stop` (end of sequence or stop token id), `length`, or `grammar`: the choice ends
    without a token, because its grammar cannot be followed any further."""
    stop_token: int = -1
    """The stop token id that ended it, when that was one of `stop_token_ids`."""
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = -1
    """With the first output of an attempt from whoever prefilled: prompt tokens not computed."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """With the first output, if they were asked for: of the prompt's second token and on."""
    timing: tuple[float, ...] = ()
    """With the first output of a worker: seconds of waiting, and then of computing the prompt or
    of receiving its KV."""


class Step(msgspec.Struct, frozen=True, tag="step"):
    """All outputs of one engine step that belong to this router; one message per step."""

    outputs: tuple[Output, ...]
    load: Load


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The worker gave this attempt up and holds nothing of it any more.

    reason: `draining`, `no_blocks` (can never fit), `transfer` (KV did not arrive), `peer`
    (the other worker is gone or refused), `reset` (this worker was paused past its lease),
    `invalid`, `internal`.
    """

    request: int
    attempt: int
    reason: str
    detail: str = ""


class Inspected(msgspec.Struct, frozen=True, tag="inspected"):
    seq: int
    ledger: Ledger


class Leaving(msgspec.Struct, frozen=True, tag="leaving"):
    """The worker drains: place nothing new here. Sent again with `done` before it exits."""

    done: bool


ToWorker = Attach | Ping | Prefill | Admit | Cancel | Inspect
ToRouter = Attached | Pong | Step | Failed | Inspected | Leaving

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_router: msgspec.msgpack.Decoder[ToRouter] = msgspec.msgpack.Decoder(ToRouter)


def encode(message: ToWorker | ToRouter) -> bytes:
    return _encoder.encode(message)


def decode_for_worker(data: bytes | memoryview) -> ToWorker:
    """Raises ProtocolError if `data` is not a valid message for a worker."""
    try:
        return _to_worker.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"bad message for a worker: {error}") from error


def decode_for_router(data: bytes | memoryview) -> ToRouter:
    """Raises ProtocolError if `data` is not a valid message for a router."""
    try:
        return _to_router.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"bad message for a router: {error}") from error
