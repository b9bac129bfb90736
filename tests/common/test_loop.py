"""The engine loop: what is posted when, when it sleeps and when it ends."""

import signal
import threading
from queue import SimpleQueue

from common.blockhash import pack_tokens
from common.events import Crashed, Drain, Draining, FromRouter, Outgoing, Send, Status
from common.loop import run
from common.messages import Admit, Step
from common.sampling import SamplingParams
from decode.engine import DecodeEngine
from tests.stub import stub_parts, stub_token


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
