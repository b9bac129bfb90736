"""The engine loop: what is posted when, when it sleeps and when it ends."""

import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from queue import SimpleQueue
from random import Random

from common.blockhash import pack_tokens
from common.events import Crashed, Drain, Draining, FromRouter, Outgoing, Send, Status
from common.loop import run
from common.messages import Admit, Cancel, Step
from common.model.batch import Row, Sampled
from common.sampling import SamplingParams
from decode.engine import DecodeEngine
from tests.stub import VOCAB, Stepped, StubPool, StubRunner, stub_parts, stub_token


class Recorder:
    """Satisfies `common.loop.Carrier`; `then` holds what is put into the inbox after each post."""

    def __init__(self, inbox: "SimpleQueue[object]", then: list[object]) -> None:
        self.status = Status()
        self.posts: list[list[Outgoing]] = []
        self.statuses: list[tuple[int, bool]] = []
        self.predictions: list[float] = []
        self._inbox = inbox
        self._then = then

    def post(self, items: list[Outgoing]) -> None:
        self.posts.append(items)
        self.statuses.append((self.status.steps, self.status.busy))
        self.predictions.append(self.status.step_s)
        if self._then and items:
            self._inbox.put(self._then.pop(0))


def admit(request: int) -> FromRouter:
    work = Admit(
        request=request,
        attempt=0,
        tokens=pack_tokens([1, 2, 3]),
        prompt_len=3,
        choices=(0,),
        params=SamplingParams(max_tokens=2, seed=request),
    )
    return FromRouter(b"%d" % request, work)


def test_one_post_per_turn_and_one_message_per_router() -> None:
    inbox: SimpleQueue[object] = SimpleQueue()
    engine = DecodeEngine(*stub_parts(8, "decode"))
    carrier = Recorder(inbox, [Drain(30.0)])
    for request in (1, 1, 2):  # the repetition is ignored
        inbox.put(admit(request))
    run(engine, inbox, carrier)
    tokens = [
        [
            (item.router, [output.tokens for output in item.message.outputs])
            for item in post
            if isinstance(item, Send) and isinstance(item.message, Step)
        ]
        for post in carrier.posts
    ]
    first = [(b"%d" % r, [(stub_token(r, 0, 3),)]) for r in (1, 2)]
    second = [(b"%d" % r, [(stub_token(r, 0, 4),)]) for r in (1, 2)]
    assert tokens == [first, second]
    # The first outputs go out while the second step is computed.
    assert carrier.statuses == [(1, True), (2, False)]
    assert carrier.posts[-1][-1] == Draining()
    assert engine.steps == 2 and engine.done
    assert 0.0 < carrier.predictions[0] < 5.0


def test_it_sleeps_until_something_comes() -> None:
    inbox: SimpleQueue[object] = SimpleQueue()
    engine = DecodeEngine(*stub_parts(8, "decode"))
    carrier = Recorder(inbox, [])
    thread = threading.Thread(target=run, args=(engine, inbox, carrier))
    thread.start()
    inbox.put(Drain(30.0))
    thread.join(timeout=5.0)
    assert not thread.is_alive()
    assert carrier.posts == [[Draining()]]


def test_a_signal_that_does_not_wake_it_up_is_handled() -> None:
    """The kernel may deliver it to another thread, or just before this one falls asleep."""
    inbox: SimpleQueue[object] = SimpleQueue()
    carrier = Recorder(inbox, [])
    before = signal.signal(signal.SIGUSR1, lambda number, frame: inbox.put(Drain(30.0)))

    def strike() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    timer = threading.Timer(0.3, strike)  # when the loop sleeps
    timer.start()
    try:
        run(DecodeEngine(*stub_parts(8, "decode")), inbox, carrier)
    finally:
        signal.signal(signal.SIGUSR1, before)
        timer.join()
    assert carrier.posts == [[Draining()]]


def test_a_crash_of_the_io_thread_ends_it() -> None:
    inbox: SimpleQueue[object] = SimpleQueue()
    inbox.put(Crashed(ValueError("sockets")))
    try:
        run(DecodeEngine(*stub_parts(8, "decode")), inbox, Recorder(inbox, []))
    except ValueError as error:
        assert str(error) == "sockets"
    else:
        raise AssertionError("it went on")


class LateRunner(StubRunner):
    """Begins a step and computes it when it is collected, as late as a device may. `during` is
    what comes into the inbox while each step is under way."""

    overlaps = True

    def __init__(self, pool: StubPool, inbox: "SimpleQueue[object]") -> None:
        super().__init__(pool)
        self.during: dict[int, list[object]] = {}
        self.engine: DecodeEngine | None = None
        self._inbox = inbox

    def launch(self, rows: Sequence[Row]) -> Stepped:
        for event in self.during.pop(len(self.batches), []):
            self._inbox.put(event)
        # What a device is told does not change any more.
        return LateStep(self, [replace(row, blocks=tuple(row.blocks)) for row in rows])


class LateStep(Stepped):
    def collect(self) -> list[tuple[Sampled, ...]]:
        assert isinstance(self.runner, LateRunner) and self.runner.engine is not None
        blocks = self.runner.engine.blocks
        for row in self.rows:
            # Raises if one of them was freed under the step.
            blocks.share(row.blocks)
            blocks.release(row.blocks)
        return super().collect()


def late_engine(inbox: "SimpleQueue[object]", num_blocks: int) -> tuple[DecodeEngine, LateRunner]:
    stub, blocks, limits, metrics = stub_parts(num_blocks, "decode")
    runner = LateRunner(stub.pool, inbox)
    engine = runner.engine = DecodeEngine(runner, blocks, limits, metrics)
    return engine, runner


def outputs_of(carrier: Recorder) -> dict[int, list[int]]:
    """Tokens by request, in the order in which they were posted."""
    tokens: dict[int, list[int]] = {}
    for post in carrier.posts:
        for item in post:
            if isinstance(item, Send) and isinstance(item.message, Step):
                for output in item.message.outputs:
                    tokens.setdefault(output.request, []).extend(output.tokens)
    return tokens


def local(request: int, prompt: list[int], max_tokens: int) -> FromRouter:
    params = SamplingParams(max_tokens=max_tokens, seed=request, ignore_eos=True)
    work = Admit(
        request=request,
        attempt=0,
        tokens=pack_tokens(prompt),
        prompt_len=len(prompt),
        choices=(0,),
        params=params,
    )
    return FromRouter(b"r", work)


def test_work_is_taken_and_said_while_a_step_is_under_way() -> None:
    inbox: SimpleQueue[object] = SimpleQueue()
    engine, runner = late_engine(inbox, 8)
    carrier = Recorder(inbox, [])
    inbox.put(local(1, [1, 2, 3], 3))
    # The second step is under way: another prompt, then a cancel of the first one, and a third.
    cancel = FromRouter(b"r", Cancel(1, 0))
    runner.during = {1: [local(2, [4, 5], 2), cancel, local(3, [6], 1), Drain(30.0)]}
    run(engine, inbox, carrier)
    expected = {
        1: [stub_token(1, 0, 3), stub_token(1, 0, 4)],  # both steps were computed
        2: [stub_token(2, 0, 2), stub_token(2, 0, 3)],
        3: [stub_token(3, 0, 1)],
    }
    assert outputs_of(carrier) == expected
    assert runner.batches == [[(0, 3)], [(3, 1)], [(0, 2), (0, 1)], [(2, 1)]]
    engine.blocks.check()
    assert engine.blocks.num_available == 8


def test_random_work_gives_the_same_tokens_and_frees_no_block_under_a_step() -> None:
    """A pool in which sequences preempt each other, and cancels at every step."""
    rng = Random(5)
    inbox: SimpleQueue[object] = SimpleQueue()
    engine, runner = late_engine(inbox, 12)
    carrier = Recorder(inbox, [])
    lengths = {request: (rng.randrange(1, 60), rng.randrange(1, 40)) for request in range(60)}
    cancelled = set(rng.sample(range(60), 20))
    for request, (prompt, output) in lengths.items():
        work = local(request, [rng.randrange(VOCAB) for _ in range(prompt)], output)
        (inbox.put(work) if request < 5 else runner.during.setdefault(request, []).append(work))
    for request in cancelled:
        at = rng.randrange(max(1, request), 150)
        runner.during.setdefault(at, []).append(FromRouter(b"r", Cancel(request, 0)))
    runner.during.setdefault(61, []).append(Drain(60.0))
    run(engine, inbox, carrier)
    tokens = outputs_of(carrier)
    for request, (prompt, output) in lengths.items():
        expected = [stub_token(request, 0, prompt + i) for i in range(output)]
        found = tokens.get(request, [])
        assert found == expected[: len(found)]
        assert found == expected or request in cancelled
    engine.blocks.check()
    assert engine.blocks.num_available == 12
    assert engine.metrics.preemptions._value.get() > 0
