"""What both schedulers share: chunks, chunk sizes, sealing of computed blocks, finish reasons.

Called by the prefill and decode schedulers and engines, in the engine thread.
"""

from dataclasses import dataclass

from common.blockhash import UNIT, chain, pack_tokens, seed, unpack_tokens
from common.errors import ProtocolError
from common.kv.blocks import BlockManager
from common.messages import Admit, Output, Prefill
from common.model.batch import Sampled
from common.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a worker can hold and compute, fixed at start."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    content_id: str
    """Seeds the block hashes."""

    def __post_init__(self) -> None:
        assert self.block_size > 0 and self.block_size % UNIT == 0, self.block_size
        assert self.num_blocks > 0, self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold the KV of `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def most_tokens(self, sequence: Sequence) -> int:
        """Tokens whose KV is held when `sequence` ends; the last token's is never computed."""
        total = sequence.prompt_len + sequence.params.max_tokens
        return max(sequence.num_tokens, min(total, self.max_model_len) - 1)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `count` tokens of `sequence` are computed in this step."""

    sequence: Sequence
    count: int

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of it that belong to the prompt; asked before the chunk is computed."""
        return max(0, min(self.count, self.sequence.prompt_len - self.sequence.num_computed))


def chunk_size(sequence: Sequence, budget: int, block_size: int) -> int:
    """Tokens of `sequence` to compute with at most `budget` (0 if there is none).

    A chunk that does not finish the prompt ends at a block boundary if it can, so that every
    block that a step touches can be sealed and shipped after it.
    """
    pending = sequence.num_pending
    if pending <= budget:
        return pending
    end = (sequence.num_computed + budget) // block_size * block_size
    return end - sequence.num_computed if end > sequence.num_computed else budget


def to_sequence(work: Prefill | Admit, router: bytes, limits: Limits) -> Sequence:
    """The sequence that stands for all choices of `work`, with the hashes of its full blocks.

    Raises ProtocolError if this worker cannot compute it (tokens out of range, too long).
    """
    try:
        tokens = unpack_tokens(work.tokens)
    except ValueError as error:
        raise ProtocolError(f"tokens: {error}") from error
    if not 0 < work.prompt_len <= len(tokens):
        raise ProtocolError(f"prompt_len {work.prompt_len} of {len(tokens)} tokens")
    # A prompt that fills the context is scored: its one output is not shown.
    if len(tokens) > limits.max_model_len - (work.params.max_tokens > 1):
        raise ProtocolError(f"{len(tokens)} tokens with max_model_len {limits.max_model_len}")
    if min(tokens) < 0 or max(tokens) >= limits.vocab_size:
        raise ProtocolError(f"a token id is outside 0..{limits.vocab_size - 1}")
    if not work.choices or len(set(work.choices)) != len(work.choices):
        raise ProtocolError(f"choices {work.choices}")
    if work.params.max_tokens <= len(tokens) - work.prompt_len:
        raise ProtocolError("all output tokens were emitted already")
    sequence = Sequence(
        request=work.request,
        attempt=work.attempt,
        choices=work.choices,
        tokens=tokens,
        prompt_len=work.prompt_len,
        params=work.params,
        router=router,
        parent=seed(limits.content_id, work.salt),
    )
    extend_hashes(sequence, len(tokens) // limits.block_size, limits.block_size)
    return sequence


def extend_hashes(sequence: Sequence, num_full: int, block_size: int) -> None:
    """Compute the hashes of the first `num_full` blocks, as far as they are missing."""
    known = len(sequence.hashes)
    if known < num_full:
        parent = sequence.hashes[-1] if known else sequence.parent
        tokens = pack_tokens(sequence.tokens[known * block_size : num_full * block_size])
        sequence.hashes += chain(tokens, parent, block_size // UNIT)


def start(sequence: Sequence, blocks: BlockManager, limits: Limits, headroom: int = 0) -> bool:
    """Give `sequence` the blocks of all its tokens, cached ones first: all of them or nothing.

    At least one token is left to compute. `headroom` blocks must stay available. False if the
    pool has not enough blocks now.
    """
    assert not sequence.blocks and sequence.num_computed == 0, sequence
    reusable = 0 if sequence.is_scored else (sequence.num_tokens - 1) // limits.block_size
    matched = blocks.match(sequence.hashes[:reusable])
    missing = limits.blocks_for(sequence.num_tokens) - len(matched)
    fresh = None
    if blocks.num_available >= missing + headroom:
        fresh = blocks.allocate(missing)
    if fresh is None:
        blocks.release(matched)
        return False
    sequence.scores.clear()
    sequence.blocks = matched + fresh
    sequence.num_computed = sequence.num_cached = len(matched) * limits.block_size
    return True


def stop(sequence: Sequence, blocks: BlockManager) -> None:
    """Give all blocks back; what was sealed stays cached until it is evicted."""
    blocks.release(sequence.blocks)
    sequence.blocks = []
    sequence.num_computed = 0


def advance(sequence: Sequence, count: int, blocks: BlockManager, block_size: int) -> None:
    """`count` more tokens were computed: seal the blocks that became full."""
    first = sequence.num_computed // block_size
    sequence.num_computed += count
    full = sequence.num_computed // block_size
    extend_hashes(sequence, full, block_size)
    for i in range(first, full):
        blocks.seal(sequence.blocks[i], sequence.hashes[i])


def finish_reason(sequence: Sequence, token: int, limits: Limits) -> tuple[str, int]:
    """Whether `token`, the next one of `sequence`, ends the choice: (reason, stop token id),
    ("", -1) if it goes on."""
    params, num_outputs = sequence.params, sequence.num_outputs + 1
    if token < 0:  # none may come
        return "grammar", -1
    if params.grammar and token in limits.eos_token_ids:
        return "stop", -1
    if num_outputs > params.min_tokens:
        if token in params.stop_token_ids:
            return "stop", token
        if token in limits.eos_token_ids and not params.ignore_eos:
            return "stop", -1
    if num_outputs >= params.max_tokens or sequence.num_tokens + 1 >= limits.max_model_len:
        return "length", -1
    return "", -1


def to_output(
    sequence: Sequence,
    choice: int,
    sampled: Sampled,
    limits: Limits,
    cached_tokens: int = -1,
    now: float = 0.0,
) -> Output:
    """The message for `sampled`, the next token of `choice`; it says whether the choice ends.

    `cached_tokens`, `now` (monotonic seconds): with the first output that this worker makes.
    """
    finish, stop_token = finish_reason(sequence, sampled.token, limits)
    scores = tuple(sequence.scores)
    sequence.scores.clear()  # shared by all choices: the first output takes them along
    return Output(
        request=sequence.request,
        attempt=sequence.attempt,
        choice=choice,
        index=sequence.num_outputs,
        tokens=(sampled.token,) if sampled.token >= 0 else (),
        finish=finish,
        stop_token=stop_token,
        logprobs=() if sampled.logprob is None else (sampled.logprob,),
        cached_tokens=cached_tokens,
        prompt_logprobs=scores,
        timing=() if cached_tokens < 0 else _timing(sequence, now),
    )


def _timing(sequence: Sequence, now: float) -> tuple[float, float]:
    return max(0.0, sequence.began - sequence.taken), max(0.0, now - sequence.began)
