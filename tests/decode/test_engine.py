"""Both engines connected in one process, with a stub model: the way of a request, step by step."""

import random
from collections.abc import Callable

import pytest

from common.blockhash import pack_tokens
from common.events import Drain, FromRouter, Reset, RouterGone, Send, Ship
from common.messages import (
    Admit,
    Cancel,
    Failed,
    FetchFrom,
    Inspect,
    Inspected,
    Peer,
    Prefill,
    Step,
)
from common.sampling import SamplingParams
from decode.engine import DecodeEngine
from kvtransfer.commands import (
    Arrived,
    BlockRef,
    Close,
    Decline,
    Delivered,
    EndFetch,
    Fetch,
    First,
    Grant,
    Key,
    Offer,
    Open,
    Refuse,
    Requested,
    Returned,
    Revoke,
    Slot,
    Wait,
    Wanted,
)
from prefill.engine import PrefillEngine
from tests.pair import D_PEER, P_PEER, ROUTER, Pair, Stream, Wire
from tests.stub import EOS, StubPool, StubRunner, stub_parts, stub_token

Make = Callable[..., Pair]


def make_pair(num_prefill: int = 32, num_decode: int = 32, **changes: object) -> Pair:
    prefill = PrefillEngine(*stub_parts(num_prefill, "prefill", **changes))
    decode = DecodeEngine(*stub_parts(num_decode, "decode", **changes))
    return Pair(prefill, decode, Wire(pool_of(prefill), pool_of(decode)))


def make_colocated(num_blocks: int = 32, **changes: object) -> Pair:
    return Pair(None, DecodeEngine(*stub_parts(num_blocks, "decode", **changes)), None)


def pool_of(engine: PrefillEngine | DecodeEngine) -> StubPool:
    assert isinstance(engine.runner, StubRunner)
    return engine.runner.pool


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(900), k=length)


def expected(prompt_len: int, params: SamplingParams, choice: int = 0) -> list[int]:
    return [stub_token(params.seed, choice, prompt_len + i) for i in range(params.max_tokens)]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 200])
@pytest.mark.parametrize("make", [make_pair, make_colocated])
def test_tokens_do_not_depend_on_topology(length: int, make: Make) -> None:
    pair = make()
    params = SamplingParams(max_tokens=40, seed=length)
    pair.submit(1, prompt_of(length), params)
    pair.run()
    stream = pair.streams[1, 0, 0]
    assert (stream.tokens, stream.finish) == (expected(length, params), "length")
    assert stream.cached == 0
    pair.assert_quiet()


def test_second_request_ships_only_what_is_missing() -> None:
    pair = make_pair()
    assert pair.wire is not None
    prompt = prompt_of(100)
    pair.submit(1, prompt, SamplingParams(max_tokens=2, seed=1))
    pair.run()
    assert pair.wire.num_shipped == 7  # 6 full blocks and the tail
    pair.submit(2, prompt, SamplingParams(max_tokens=2, seed=2))
    pair.run()
    assert pair.wire.num_shipped == 8  # the tail alone
    assert pair.streams[2, 0, 0].cached == 96
    pair.submit(3, prompt[:96], SamplingParams(max_tokens=2, seed=3))
    pair.run()
    assert pair.wire.num_shipped == 8  # everything was there
    assert pair.streams[3, 0, 0].cached == 80  # one token at least is computed: its whole block
    assert pair.streams[3, 0, 0].tokens == [stub_token(3, 0, 96), stub_token(3, 0, 97)]
    pair.assert_quiet()


@pytest.mark.parametrize("length", [32, 40])
@pytest.mark.parametrize("make", [make_pair, make_colocated])
def test_choices_share_the_prompt(length: int, make: Make) -> None:
    pair = make()
    params = SamplingParams(max_tokens=30, seed=7)
    pair.submit(1, prompt_of(length), params, choices=(0, 1, 2))
    pair.run()
    for choice in range(3):
        assert pair.streams[1, 0, choice].tokens == expected(length, params, choice)
    pair.assert_quiet()


@pytest.mark.parametrize("make", [make_pair, make_colocated])
def test_choices_that_end_at_the_first_token(make: Make) -> None:
    pair = make()
    ended = stub_token(5, 1, 20)
    params = SamplingParams(max_tokens=6, seed=5, stop_token_ids=(ended,))
    pair.submit(1, prompt_of(20), params, choices=(0, 1))
    pair.run()
    assert pair.streams[1, 0, 1].tokens == [ended]
    assert pair.streams[1, 0, 1].finish == "stop"
    assert pair.streams[1, 0, 0].tokens == expected(20, params)
    # And all of them: the decode worker is told to forget the request.
    pair.submit(2, prompt_of(20), params, choices=(1,))
    pair.run()
    assert (pair.streams[2, 0, 1].tokens, pair.streams[2, 0, 1].finish) == ([ended], "stop")
    assert pair.failed == {}
    pair.assert_quiet()


@pytest.mark.parametrize("make", [make_pair, make_colocated])
def test_one_token_and_resumed_requests(make: Make) -> None:
    pair = make()
    pair.submit(1, prompt_of(20), SamplingParams(max_tokens=1, seed=5))
    params = SamplingParams(max_tokens=10, seed=6)
    so_far = expected(20, params)[:4]
    pair.submit(2, prompt_of(20) + so_far, params, attempt=3, prompt_len=20)
    pair.streams[2, 3, 0] = Stream(tokens=list(so_far))
    pair.run()
    assert pair.streams[1, 0, 0].tokens == [stub_token(5, 0, 20)]
    assert pair.streams[2, 3, 0].tokens == expected(20, params)
    assert pair.streams[2, 3, 0].finish == "length"
    pair.assert_quiet()


def test_preemption_loses_nothing() -> None:
    # Eight requests of up to 5 blocks each in a pool of 12.
    pair = make_pair(num_decode=12)
    params = {i: SamplingParams(max_tokens=50, seed=i) for i in range(8)}
    for i in range(8):
        pair.submit(i, prompt_of(20, seed=i), params[i])
    pair.run()
    for i in range(8):
        assert pair.streams[i, 0, 0].tokens == expected(20, params[i])
    assert pair.failed == {}
    assert pair.decode.metrics.preemptions._value.get() > 0
    pair.assert_quiet()


def test_pool_that_holds_exactly_one_request() -> None:
    # 33 + 32 - 1 tokens of KV: 4 blocks.
    for pair in (make_pair(num_prefill=3, num_decode=4), make_colocated(4)):
        params = SamplingParams(max_tokens=32, seed=1)
        for i in range(3):
            pair.submit(i, prompt_of(33, seed=i), params, choices=(0, 1))
        pair.run()
        for i in range(3):
            for choice in range(2):
                assert pair.streams[i, 0, choice].tokens == expected(33, params, choice)
        pair.assert_quiet()
        pair.submit(9, prompt_of(33), SamplingParams(max_tokens=33, seed=1))
        pair.run()
        assert pair.failed == {(9, 0): "no_blocks"}
        pair.assert_quiet()


def test_eos_and_minimum() -> None:
    pair = make_colocated()
    stop = stub_token(1, 0, 12)
    params = SamplingParams(max_tokens=9, seed=1, stop_token_ids=(stop, EOS), min_tokens=2)
    pair.submit(1, prompt_of(10), params)
    pair.run()
    stream = pair.streams[1, 0, 0]
    assert (stream.tokens, stream.finish) == (expected(10, params)[:3], "stop")


@pytest.mark.parametrize("stage", range(12))
def test_cancel_at_every_stage(stage: int) -> None:
    pair = make_pair(max_num_batched_tokens=32)
    pair.submit(1, prompt_of(100), SamplingParams(max_tokens=20, seed=1))
    for _ in range(stage):
        for engine in pair.engines:
            while moves := pair.moves():
                moves[-1]()
            pair.turn(engine)
    pair.cancel(1)
    pair.run()
    pair.assert_quiet()
    # The cancelled attempt cannot come back, another one can.
    pair.submit(1, prompt_of(100), SamplingParams(max_tokens=20, seed=1))
    params = SamplingParams(max_tokens=3, seed=2)
    pair.submit(1, prompt_of(100), params, attempt=1)
    pair.run()
    assert pair.streams[1, 1, 0].tokens == expected(100, params)
    pair.assert_quiet()


@pytest.mark.parametrize("stage", range(12))
@pytest.mark.parametrize("make", [make_pair, make_colocated])
def test_cancel_of_one_choice_at_every_stage(make: Make, stage: int) -> None:
    pair = make(max_num_batched_tokens=32)
    params = SamplingParams(max_tokens=20, seed=1)
    pair.submit(1, prompt_of(100), params, choices=(0, 1, 2))
    for _ in range(stage):
        for engine in pair.engines:
            while moves := pair.moves():
                moves[-1]()
            pair.turn(engine)
    while moves := pair.moves():  # all were admitted before one is cancelled
        moves[0]()
    before = len(pair.streams[1, 0, 1].tokens) if (1, 0, 1) in pair.streams else 0
    pair.cancel(1, choices=(1,))
    pair.run()
    for choice in (0, 2):
        assert pair.streams[1, 0, choice].tokens == expected(100, params, choice)
        assert pair.streams[1, 0, choice].finish == "length"
    # What had been computed may still come; from the prefill worker that is the first token.
    after = pair.streams[1, 0, 1].tokens if (1, 0, 1) in pair.streams else []
    assert len(after) <= max(before, 1) and pair.failed == {}
    pair.assert_quiet()


@pytest.mark.parametrize("stage", range(12))
@pytest.mark.parametrize("make", [make_pair, make_colocated])
def test_cancel_of_one_choice_after_another(make: Make, stage: int) -> None:
    pair = make(max_num_batched_tokens=32)
    pair.submit(1, prompt_of(100), SamplingParams(max_tokens=20, seed=1), choices=(0, 1))
    for _ in range(stage):
        for engine in pair.engines:
            while moves := pair.moves():
                moves[-1]()
            pair.turn(engine)
    while moves := pair.moves():
        moves[0]()
    pair.cancel(1, choices=(1,))
    pair.cancel(1, choices=(0,))
    pair.run()
    assert pair.decode.scheduler.running == pair.decode.scheduler.waiting == []
    assert all(len(stream.tokens) < 20 for stream in pair.streams.values())
    # The prefill worker may not have known, but what it shipped was not wanted any more.
    assert pair.failed in ({}, {(1, 0): "peer"})
    pair.assert_quiet()


def test_cancel_of_a_choice_that_was_preempted() -> None:
    pair = make_colocated(num_blocks=6)
    params = SamplingParams(max_tokens=40, seed=1)
    pair.submit(1, prompt_of(20), params, choices=(0, 1, 2))
    scheduler = pair.decode.scheduler
    for _ in range(100):
        while moves := pair.moves():
            moves[0]()
        if scheduler.waiting and scheduler.running:
            break
        pair.turn(pair.decode)
    preempted = scheduler.waiting[0].choices[0]
    pair.cancel(1, choices=(preempted,))
    pair.run()
    for choice in range(3):
        done = pair.streams[1, 0, choice].finish == "length"
        assert done == (choice != preempted)
    pair.assert_quiet()


def test_cancel_overtakes_the_work() -> None:
    pair = make_pair()
    pair.cancel(1)
    pair.submit(1, prompt_of(40), SamplingParams(max_tokens=5))
    pair.run()
    assert pair.streams == {} and pair.failed == {}
    pair.assert_quiet()


def test_router_gone_reset_and_drain() -> None:
    for event, reason in ((RouterGone(ROUTER), None), (Reset(), "reset"), (Drain(0.0), "draining")):
        pair = make_pair(max_num_batched_tokens=32)
        for i in range(4):
            pair.submit(i, prompt_of(70, seed=i), SamplingParams(max_tokens=20, seed=1))
        for _ in range(4):
            while moves := pair.moves():
                moves[0]()
            for engine in pair.engines:
                pair.turn(engine)
        for engine in pair.engines:
            engine.take(event, pair.now)
        pair.run()
        assert set(pair.failed.values()) == (set() if reason is None else {reason}), event
        pair.assert_quiet()
        assert all(engine.done == isinstance(event, Drain) for engine in pair.engines)


def test_draining_finishes_what_is_held() -> None:
    pair = make_pair()
    params = SamplingParams(max_tokens=20, seed=1)
    pair.submit(1, prompt_of(70), params)
    while moves := pair.moves():
        moves[0]()
    for engine in pair.engines:
        engine.take(Drain(30.0), pair.now)
        assert not engine.done
    pair.submit(2, prompt_of(70), params)
    pair.run()
    assert pair.streams[1, 0, 0].tokens == expected(70, params)
    assert pair.failed == {(2, 0): "draining"}
    assert all(engine.done for engine in pair.engines)


def test_lost_transfer_fails_the_attempt_and_keeps_what_landed() -> None:
    pair = make_pair(max_num_batched_tokens=32)
    assert pair.wire is not None
    pair.submit(1, prompt_of(100), SamplingParams(max_tokens=5, seed=1))
    for _ in range(2):
        while moves := pair.moves():
            moves[0]()
        for engine in pair.engines:
            pair.turn(engine)
    while moves := pair.moves():
        moves[0]()
    key = next(iter(pair.wire.transfers))
    landed = len(pair.wire.transfers[key].landed)
    assert landed == 4
    pair.wire.lose(key)
    pair.run()
    assert pair.failed == {(1, 0): "transfer"}
    pair.assert_quiet()
    assert len(pair.decode.blocks.cached_hashes()) == landed


def admit(
    request: int,
    tokens: list[int],
    prefill: Peer | None = P_PEER,
    fetch: FetchFrom | None = None,
) -> FromRouter:
    params = SamplingParams(max_tokens=5, seed=request)
    work = Admit(
        request=request,
        attempt=0,
        tokens=pack_tokens(tokens),
        prompt_len=len(tokens),
        choices=(0,),
        params=params,
        prefill=prefill,
        fetch=fetch,
    )
    return FromRouter(ROUTER, work)


def shipped(decode: DecodeEngine) -> list[object]:
    """The commands of one turn in which nothing is computed."""
    assert decode.next_batch() == []
    return [item.command for item in decode.flush() if isinstance(item, Ship)]


def computed(decode: DecodeEngine) -> list[int]:
    """The tokens of the steps until there is nothing to compute."""
    tokens: list[int] = []
    while batch := decode.next_batch():
        decode.settle(batch, decode.step(batch))
        for item in decode.flush():
            if isinstance(item, Send) and isinstance(item.message, Step):
                tokens += [token for output in item.message.outputs for token in output.tokens]
    return tokens


def tokens_of(request: int, prompt_len: int) -> list[int]:
    """What `admit` asks for."""
    return expected(prompt_len, SamplingParams(max_tokens=5, seed=request))


def test_the_last_sequence_waits_for_blocks_that_are_given_to_a_fetch() -> None:
    decode = DecodeEngine(*stub_parts(4, "decode"))
    decode.take(admit(1, prompt_of(32), None), 0.0)
    assert computed(decode) == tokens_of(1, 32)
    held = b"".join(decode.blocks.cached_hashes())
    decode.take(Requested(Key(9, 0), P_PEER, held), 0.0)
    decode.take(admit(2, prompt_of(30, seed=2), None), 0.0)
    assert computed(decode) == tokens_of(2, 30)[:3]  # two blocks are full
    ledger = decode.blocks.ledger()
    assert (ledger.in_use, ledger.leased) == (2, 2)
    decode.take(Delivered(Key(9, 0), 2, 0), 0.0)
    assert computed(decode) == tokens_of(2, 30)[3:]
    assert decode.idle() and decode.scheduler.num_lent == 0


def test_fetches_take_no_blocks_that_the_queue_waits_for() -> None:
    decode = DecodeEngine(*stub_parts(8, "decode"))
    decode.take(admit(1, prompt_of(32), None), 0.0)
    assert computed(decode) == tokens_of(1, 32)
    held = b"".join(decode.blocks.cached_hashes())
    fetch = FetchFrom(P_PEER, 3, 60.0)
    decode.take(admit(2, prompt_of(60, seed=2), None, fetch), 0.0)
    for request, length in ((3, 70), (4, 50)):
        decode.take(admit(request, prompt_of(length, seed=request)), 0.0)
        decode.take(Wanted(Key(request, 0), P_PEER, length), 0.0)
    assert [type(command) for command in shipped(decode)] == [Fetch, Grant, Wait]
    # 3 of 8 blocks are left: too few for 4, and so none for a fetch, here or elsewhere.
    decode.take(Wanted(Key(2, 0), P_PEER, 16), 0.0)
    decode.take(Requested(Key(9, 0), P_PEER, held), 0.0)
    assert shipped(decode) == [
        EndFetch(Key(2, 0)),
        Refuse(Key(2, 0), "no_blocks"),
        Decline(Key(9, 0), P_PEER, "busy"),
    ]
    for request in (2, 4):
        decode.take(FromRouter(ROUTER, Cancel(request, 0)), 0.0)
    for request in (9, 10):
        decode.take(Requested(Key(request, 0), P_PEER, held), 0.0)
    # The last block is the next one of 3.
    assert shipped(decode) == [
        Refuse(Key(4, 0), "gone"),
        Open(Key(9, 0), P_PEER, 32),
        Offer(Key(9, 0), (BlockRef(0, 0, 16), BlockRef(1, 1, 16))),
        Close(Key(9, 0), ()),
        Decline(Key(10, 0), P_PEER, "busy"),
    ]
    decode.blocks.check()


def test_an_offer_that_comes_too_late_takes_no_blocks() -> None:
    decode = DecodeEngine(*stub_parts(8, "decode"))
    decode.take(admit(1, prompt_of(60), None, FetchFrom(P_PEER, 3, 2.0)), 10.0)
    assert [type(command) for command in shipped(decode)] == [Fetch]
    decode.take(Wanted(Key(1, 0), P_PEER, 48), 12.0)
    commands = [item.command for item in decode.flush() if isinstance(item, Ship)]
    assert commands == [EndFetch(Key(1, 0)), Refuse(Key(1, 0), "gone")]
    assert decode.blocks.ledger().receiving == 0
    assert decode.metrics.fetches.labels("late")._value.get() == 1
    assert computed(decode) == tokens_of(1, 60)


def test_request_for_slots_before_its_admit() -> None:
    decode = DecodeEngine(*stub_parts(8, "decode"))
    known, unknown, ended, strange = (Key(i, 0) for i in range(4))
    for key in (known, unknown, ended, strange):
        decode.take(Wanted(key, P_PEER, 20), 10.0)
    assert shipped(decode) == [] and decode.deadline() == 12.0
    decode.take(admit(0, prompt_of(20)), 11.0)
    decode.take(Returned(ended, (), "finished"), 11.0)
    decode.take(admit(2, prompt_of(20)), 11.0)  # over before it began: no word to the router
    decode.take(admit(3, prompt_of(21)), 11.0)  # another prompt than the sender's
    assert shipped(decode) == [
        Refuse(strange, "gone"),
        Grant(known, (Slot(0, 0, 1), Slot(1, 1, 1))),
    ]
    decode.expire(12.0)
    assert shipped(decode) == [Refuse(unknown, "gone")]
    assert decode.deadline() is None
    decode.take(Wanted(ended, P_PEER, 20), 12.0)
    assert shipped(decode) == [Refuse(ended, "gone")]


def test_requests_for_slots_wait_in_order_of_arrival() -> None:
    decode = DecodeEngine(*stub_parts(8, "decode"))
    keys = [Key(i, 0) for i in range(4)]
    lengths = (100, 60, 16, 10)
    for key, length in zip(keys, lengths, strict=True):
        decode.take(admit(key.request, prompt_of(length, seed=length)), 0.0)
    for key, length in zip(reversed(keys), reversed(lengths), strict=True):
        decode.take(Wanted(key, P_PEER, length), 0.0)
    # 7 of 8 blocks go to the first; the second waits, and nobody overtakes it.
    grant, *others = shipped(decode)
    assert grant == Grant(keys[0], tuple(Slot(i, i, 1) for i in range(7)))
    assert others == [Wait(key) for key in keys[1:]]
    decode.take(Wanted(keys[2], P_PEER, 16), 0.0)
    assert shipped(decode) == [Wait(keys[2])]
    # A cancelled grant is used again only after it came back; what landed stays cached.
    decode.take(FromRouter(ROUTER, Cancel(0, 0)), 1.0)
    assert shipped(decode) == [Revoke(keys[0])]
    assert decode.blocks.ledger().receiving == 7 and not decode.idle()
    decode.take(Returned(keys[0], (0, 1, 3), "revoked"), 1.0)
    granted = shipped(decode)
    assert [type(command) for command in granted] == [Grant, Grant, Grant]
    assert [command.key for command in granted] == keys[1:]  # type: ignore[attr-defined]
    assert len(decode.blocks.cached_hashes()) == 2  # 0 and 1: 3 lies behind a gap
    decode.blocks.check()


def test_first_tokens_of_choices_that_nobody_asked_for() -> None:
    decode = DecodeEngine(*stub_parts(8, "decode"))
    decode.take(admit(1, prompt_of(20)), 0.0)
    decode.take(Wanted(Key(1, 0), P_PEER, 20), 0.0)
    shipped(decode)
    decode.take(Arrived(Key(1, 0), (First(3, 7, None),), 0), 0.0)
    assert decode.next_batch() == []
    sent = [item.message for item in decode.flush() if isinstance(item, Send)]
    assert [(m.request, m.reason) for m in sent if isinstance(m, Failed)] == [(1, "transfer")]
    assert decode.idle() and decode.blocks.ledger().in_use == 0


def test_a_prefill_worker_takes_no_admit_and_a_decode_worker_no_prefill() -> None:
    pair = make_pair()
    assert pair.prefill is not None
    pair.prefill.take(admit(1, prompt_of(20)), 0.0)
    work = admit(2, prompt_of(20)).message
    assert isinstance(work, Admit)
    fields = {name: getattr(work, name) for name in work.__struct_fields__ if name != "prefill"}
    pair.decode.take(FromRouter(ROUTER, Prefill(**fields, decode=D_PEER)), 0.0)
    pair.run()
    assert pair.failed == {(1, 0): "invalid", (2, 0): "invalid"}


def test_bad_work_is_refused() -> None:
    pair = make_pair(max_model_len=64)
    pair.submit(1, [1000], SamplingParams(max_tokens=5))
    pair.submit(2, prompt_of(64), SamplingParams(max_tokens=5))
    pair.submit(3, prompt_of(10), SamplingParams(max_tokens=5), choices=(1, 1))
    pair.submit(4, prompt_of(10), SamplingParams(max_tokens=5), prompt_len=5)
    pair.submit(5, prompt_of(65), SamplingParams(max_tokens=1))
    pair.submit(6, prompt_of(64), SamplingParams(max_tokens=1))
    pair.run()
    assert pair.failed == {(i, 0): "invalid" for i in range(1, 6)}
    pair.assert_quiet()


def test_inspect() -> None:
    decode = make_colocated(8).decode
    decode.take(FromRouter(b"r", Inspect(3)), 0.0)
    assert decode.flush() == [Send(b"r", Inspected(3, decode.blocks.ledger(0)))]


@pytest.mark.parametrize("seed", range(6))
def test_random_requests_with_cancels(seed: int) -> None:
    rng = random.Random(seed)
    pair = make_pair(
        num_prefill=rng.randint(16, 40),
        num_decode=rng.randint(16, 40),
        max_num_seqs=rng.choice([2, 5, 8]),
        max_num_batched_tokens=rng.choice([5, 16, 48, 200]),
    )
    assert pair.wire is not None
    shared = prompt_of(80, seed=99)
    todo = list(range(150))
    wanted: dict[int, tuple[int, SamplingParams, tuple[int, ...]]] = {}
    cancelled: set[int] = set()
    for _ in range(200_000):
        dice = rng.random()
        if todo and dice < 0.1:
            request = todo.pop()
            prompt = shared[: rng.randint(0, 80)] + prompt_of(rng.randint(1, 100), seed=request)
            params = SamplingParams(max_tokens=rng.randint(1, 60), seed=request)
            choices = tuple(range(rng.choice([1, 1, 1, 2, 3])))
            wanted[request] = (len(prompt), params, choices)
            pair.submit(request, prompt, params, choices=choices, local=rng.random() < 0.2)
        elif wanted and dice < 0.12:
            request = rng.choice(list(wanted))
            if request not in cancelled and rng.random() < 0.5:
                cancelled.add(request)
                pair.cancel(request)
        elif dice < 0.6 and (moves := pair.moves()):
            rng.choice(moves)()
        else:
            pair.turn(rng.choice(pair.engines))
        if not todo and not pair.moves() and all(engine.idle() for engine in pair.engines):
            break
        pair.now += 0.0001
    pair.run()
    pair.assert_quiet()
    assert len(cancelled) > 10
    for request, (length, params, choices) in wanted.items():
        for choice in choices:
            if request not in cancelled:
                stream = pair.streams[request, 0, choice]
                assert stream.tokens == expected(length, params, choice), request
                assert stream.finish == "length"
    assert set(id for id, _ in pair.failed) <= cancelled, pair.failed
