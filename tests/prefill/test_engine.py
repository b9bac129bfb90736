"""What a prefill worker says to its decode worker, step by step, and when it lets blocks go."""

import random

from common.blockhash import pack_tokens
from common.events import Announce, Drain, Draining, Fence, Fenced, FromRouter, Publish, Send, Ship
from common.messages import Cancel, Failed, Output, Peer, Prefill, Step
from common.sampling import SamplingParams
from kvtransfer.commands import (
    Abort,
    BlockRef,
    Broken,
    Close,
    Decline,
    Delivered,
    First,
    Key,
    Offer,
    Open,
    Requested,
    Ticketed,
)
from prefill.engine import PrefillEngine
from tests.pair import D_PEER, ROUTER
from tests.stub import stub_parts, stub_token


def make_engine(num_blocks: int = 16, **changes: object) -> PrefillEngine:
    return PrefillEngine(*stub_parts(num_blocks, "prefill", **changes))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(900), k=length)


def work(
    request: int,
    tokens: list[int],
    decode: Peer | None = D_PEER,
    max_tokens: int = 10,
    choices: tuple[int, ...] = (0,),
    stop: tuple[int, ...] = (),
) -> FromRouter:
    return FromRouter(
        ROUTER,
        Prefill(
            request=request,
            attempt=0,
            tokens=pack_tokens(tokens),
            prompt_len=len(tokens),
            choices=choices,
            params=SamplingParams(max_tokens=max_tokens, seed=request, stop_token_ids=stop),
            decode=decode,
        ),
    )


def step(engine: PrefillEngine) -> tuple[list[object], list[object]]:
    """One turn: transfer commands and fences, then messages to the router."""
    batch = engine.next_batch()
    if batch:
        engine.settle(batch, engine.step(batch))
    items = engine.flush()
    commands = [i.command if isinstance(i, Ship) else i for i in items if not _is_talk(i)]
    return commands, [item.message for item in items if isinstance(item, Send)]


def _is_talk(item: object) -> bool:
    return isinstance(item, Send | Publish | Announce | Draining)


def outputs(messages: list[object]) -> list[Output]:
    return [output for m in messages if isinstance(m, Step) for output in m.outputs]


def test_blocks_are_offered_after_each_chunk() -> None:
    engine = make_engine(max_num_batched_tokens=40)
    engine.take(work(1, prompt_of(70)), 0.0)
    key = Key(1, 0)
    # 40 tokens would end inside a block: the chunk ends at 32.
    assert step(engine) == (
        [Open(key, D_PEER, 70), Offer(key, (BlockRef(0, 0, 16), BlockRef(1, 1, 16)))],
        [],
    )
    commands, messages = step(engine)
    token = stub_token(1, 0, 70)
    assert commands == [
        Offer(key, (BlockRef(2, 2, 16), BlockRef(3, 3, 16))),
        Offer(key, (BlockRef(4, 4, 6),)),
        Close(key, (First(0, token, None, 0),)),
    ]
    assert outputs(messages) == [Output(1, 0, 0, 0, (token,), cached_tokens=0, timing=(0.0, 0.0))]
    assert engine.blocks.ledger().leased == 5 and not engine.idle()
    engine.take(Ticketed(key, 5), 0.0)
    engine.take(Delivered(key, 5, 0), 0.0)
    assert engine.blocks.ledger().cached == 4 and engine.idle()
    # Once more: cached blocks are offered at once, one token at least is computed.
    engine.take(work(2, prompt_of(70)), 0.0)
    commands, messages = step(engine)
    assert commands[:2] == [
        Open(Key(2, 0), D_PEER, 70),
        Offer(Key(2, 0), tuple(BlockRef(i, i, 16) for i in range(4))),
    ]
    assert outputs(messages)[0].cached_tokens == 64
    assert engine.metrics.cached_tokens._value.get() == 64
    assert engine.metrics.computed_tokens._value.get() == 76


def test_blocks_of_an_aborted_transfer_are_kept_until_the_fence() -> None:
    for num_steps in (1, 2):
        engine = make_engine(max_num_batched_tokens=32)
        engine.take(work(1, prompt_of(60)), 0.0)
        for _ in range(num_steps):
            step(engine)
        engine.take(FromRouter(ROUTER, Cancel(1, 0)), 0.0)
        assert step(engine) == ([Abort(Key(1, 0), "cancelled"), Fence((1, 0))], [])
        assert engine.blocks.ledger().leased == 4 and engine.blocks.ledger().in_use == 0
        assert not engine.idle()
        engine.take(Delivered(Key(1, 0), 4, 0), 0.0)  # crossed the abort
        engine.take(Broken(Key(1, 0), "refused", "gone"), 0.0)
        engine.take(Fenced((1, 0)), 0.0)
        assert engine.idle() and engine.blocks.num_available == 16
        assert engine.flush() == []


def test_choices_are_cancelled_only_together() -> None:
    engine = make_engine(max_num_batched_tokens=32)
    engine.take(work(1, prompt_of(60), choices=(0, 1)), 0.0)
    step(engine)
    engine.take(FromRouter(ROUTER, Cancel(1, 0, (1,))), 0.0)
    assert engine.is_live((1, 0))
    engine.take(FromRouter(ROUTER, Cancel(1, 0, (0, 1))), 0.0)
    assert step(engine) == ([Abort(Key(1, 0), "cancelled"), Fence((1, 0))], [])
    engine.take(FromRouter(ROUTER, Cancel(2, 0, (0,))), 0.0)  # of nobody
    engine.take(Fenced((1, 0)), 0.0)
    assert engine.idle()


def test_ended_choices_are_not_handed_over() -> None:
    engine = make_engine()
    ended = stub_token(1, 1, 20)
    engine.take(work(1, prompt_of(20), choices=(0, 1), stop=(ended,)), 0.0)
    commands, messages = step(engine)
    assert commands[-1] == Close(Key(1, 0), (First(0, stub_token(1, 0, 20), None, 0),))
    assert [(o.choice, o.finish, o.stop_token) for o in outputs(messages)] == [
        (0, "", -1),
        (1, "stop", ended),
    ]
    engine.take(work(2, prompt_of(20), stop=(stub_token(2, 0, 20),)), 0.0)
    commands, messages = step(engine)
    assert commands[-2:] == [Abort(Key(2, 0), "finished"), Fence((2, 0))]
    assert outputs(messages)[0].finish == "stop"
    engine.take(work(3, prompt_of(20), decode=None, max_tokens=1), 0.0)
    commands, messages = step(engine)
    assert commands == [] and outputs(messages)[0].finish == "length"


def test_broken_transfer_is_told_to_the_router() -> None:
    engine = make_engine()
    for request, reason, told in ((1, "stalled", "transfer"), (2, "peer", "peer")):
        engine.take(work(request, prompt_of(20)), 0.0)
        step(engine)
        engine.take(Broken(Key(request, 0), reason, "why"), 0.0)
        assert step(engine) == ([], [Failed(request, 0, told, f"{reason}: why")])
        assert engine.idle()


def test_a_decode_worker_that_takes_nothing_holds_half_the_pool_at_most() -> None:
    engine = make_engine(16, max_num_batched_tokens=500)
    slow, other = D_PEER, Peer("d1", 5, "inproc://d1")
    for request, decode in ((1, slow), (2, slow), (3, slow), (4, other), (5, None)):
        engine.take(work(request, prompt_of(48, seed=request), decode), 0.0)
    step(engine)
    started = [p.sequence.request for p in engine.scheduler.shipping]
    # 3 blocks each: the third of `slow` would make 9 of 16; the others go ahead of it.
    assert started == [1, 2, 4]
    assert [p.sequence.request for p in engine.scheduler.waiting] == [3]
    for request in (1, 4):
        engine.take(Ticketed(Key(request, 0), 3), 0.0)
    step(engine)
    assert [p.sequence.request for p in engine.scheduler.shipping] == [1, 2, 4, 3]


def test_nothing_is_given_away_while_a_prompt_waits_for_blocks() -> None:
    engine = make_engine(8)
    engine.take(work(1, prompt_of(32, seed=1), decode=None, max_tokens=1), 0.0)
    step(engine)
    held = b"".join(engine.blocks.cached_hashes())
    engine.take(work(2, prompt_of(90, seed=2)), 0.0)
    step(engine)
    engine.take(work(3, prompt_of(50, seed=3), decode=None, max_tokens=1), 0.0)
    step(engine)  # 2 is computed, and its 6 blocks leave too few for 3
    engine.take(Requested(Key(9, 0), D_PEER, held), 0.0)
    assert step(engine)[0] == [Decline(Key(9, 0), D_PEER, "busy")]
    engine.take(FromRouter(ROUTER, Cancel(3, 0)), 0.0)
    engine.take(Requested(Key(9, 0), D_PEER, held), 0.0)
    assert step(engine)[0] == [
        Open(Key(9, 0), D_PEER, 32),
        Offer(Key(9, 0), (BlockRef(0, 0, 16), BlockRef(1, 1, 16))),
        Close(Key(9, 0), ()),
    ]


def test_a_prompt_larger_than_half_the_pool_starts_alone() -> None:
    engine = make_engine(16, max_num_batched_tokens=500)
    engine.take(work(1, prompt_of(250)), 0.0)
    step(engine)
    assert len(engine.scheduler.shipping) == 1
    engine.take(work(2, prompt_of(257)), 0.0)
    assert step(engine)[1] == [
        Failed(2, 0, "no_blocks", "17 blocks needed, the pool has 16"),
    ]


def test_draining_ends_when_the_last_blocks_were_taken() -> None:
    engine = make_engine()
    engine.take(work(1, prompt_of(20)), 0.0)
    step(engine)
    engine.take(Drain(30.0), 5.0)
    engine.take(Drain(30.0), 9.0)
    assert engine.flush() == [Draining()]
    assert engine.deadline() == 35.0 and not engine.done
    engine.take(work(2, prompt_of(20)), 6.0)
    assert step(engine)[1] == [Failed(2, 0, "draining")]
    engine.take(Delivered(Key(1, 0), 2, 0), 7.0)
    assert engine.done
