"""A deterministic simulation of transfers between workers, with a fake clock and network.

`simulate(seed)` runs seconds of faults (messages lost, late, doubled, reordered, damaged;
connections lost, or deaf in one direction; workers killed, restarted, paused), then heals
everything and asserts that what is left comes to an end and that new transfers succeed. A failure
is replayed by its seed:

    python -m tests.kvtransfer.simulation --start 4711 --seeds 1
"""

import argparse
import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from common.config import TimerConfig
from common.errors import ProtocolError
from common.messages import Peer
from kvtransfer import protocol
from kvtransfer.commands import Abort, Key, SenderCommand
from kvtransfer.outgoing import Shipment
from kvtransfer.timers import Timers
from tests.kvtransfer.pool import BLOCK_SIZE
from tests.kvtransfer.simulated_worker import (
    BLOCK_BYTES,
    FETCH,
    RESTS,
    Command,
    SimulatedWorker,
)

TIMERS = Timers.of(TimerConfig(heartbeat_s=1, dead_after=3, lease_s=2.5, stall_s=1.5))
FAULTY_S = 7.0
HEAL_S = 20.0
"""Everything that the faults left behind must have ended so long after the last of them."""
TICK_S = 0.1
LATE_S = 1.5
"""How much later than that a message of the time before may still come."""
CALM = 4
"""Transfers after the faults, all of which must succeed."""


WAYS = ("copied", "lazy", "shared")
"""When a shipment's bytes are read from the sender's pool: as it leaves (zmq), for as long as its
transfer lives (tcp), or by the receiver whenever it comes to it (shm)."""


@dataclass(slots=True)
class Faults:
    """Probabilities per message (the first five) and per second; `one_way` of a second in which
    the messages of one lane of a connection are lost."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    data_drop: float = 0.0
    disconnect: float = 0.0
    kill: float = 0.0
    pause: float = 0.0
    one_way: float = 0.0

    @staticmethod
    def draw(random: Random) -> "Faults":
        """Each fault is there in about half of the runs."""

        def some(limit: float) -> float:
            return random.random() * limit if random.random() < 0.5 else 0.0

        return Faults(
            some(0.2), some(0.2), some(0.2), some(0.1), some(0.1), some(0.4), some(0.2), some(0.3),
            some(0.3),
        )  # fmt: skip


@dataclass(slots=True, eq=False)
class Connection:
    """From a sender's link to one life of a receiver; control and data are ordered each."""

    source: SimulatedWorker
    target: SimulatedWorker
    peer: Peer
    route: bytes
    is_open: bool = True
    ready_at: dict[str, float] = field(default_factory=dict)
    deaf_until: dict[str, float] = field(default_factory=dict)
    """Lanes on which nothing gets through: an asymmetric partition."""


class Simulation:
    def __init__(self, seed: int, faults: Faults | None = None, rests: float = RESTS) -> None:
        self.random = Random(seed)
        self.faults = Faults.draw(self.random) if faults is None else faults
        self.rests = rests
        self.way = self.random.choice(WAYS)
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._routes: dict[bytes, Connection] = {}
        self._connections: dict[SimulatedWorker, dict[Peer, Connection]] = {}
        self._connecting: set[tuple[SimulatedWorker, Peer]] = set()
        self._backlog: dict[SimulatedWorker, list[Callable[[], None]]] = {}
        self.lives: list[SimulatedWorker] = []
        self.workers: dict[str, SimulatedWorker] = {}
        self.requests = 0
        for id in ("a", "b", "c"):
            self.begin_life(id)

    # ------------------------------------------------------------ clock

    def after(self, delay: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay, self._count, action))

    def on(self, worker: SimulatedWorker, delay: float, action: Callable[[], None]) -> None:
        """Let a worker do something, when it is alive and not paused."""

        def run() -> None:
            if not worker.alive:
                return
            if worker.paused:
                self._backlog[worker].append(run)
                return
            action()
            self.flush(worker)

        self.after(delay, run)

    def run_until(self, end: float) -> None:
        while self._heap and self._heap[0][0] <= end:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = end

    # ------------------------------------------------------------ workers

    def begin_life(self, id: str) -> None:
        epoch = self.random.getrandbits(62)
        worker = SimulatedWorker(id, epoch, self.random, TIMERS)
        worker.calm = self.faults == Faults()
        worker.rests = self.rests
        worker.receiver.data = {"sim": id}
        worker.active_since = self.now
        self.workers[id] = worker
        self.lives.append(worker)
        self._connections[worker] = {}
        self._tick(worker)
        self._step(worker)

    def _tick(self, worker: SimulatedWorker) -> None:
        def tick() -> None:
            worker.sender.set_progress(worker.steps, 0.0)
            worker.sender.tick(self.now)
            worker.receiver.tick(self.now)
            self.on(worker, TICK_S, tick)

        self.on(worker, TICK_S, tick)

    def _step(self, worker: SimulatedWorker) -> None:
        def step() -> None:
            self.order(worker, worker.take_events())
            self.order(worker, worker.compute())
            self.order(worker, worker.give_up_late(self.now))
            self.on(worker, self.random.uniform(0.02, 0.4), step)

        self.on(worker, 0.0, step)

    def order(self, worker: SimulatedWorker, commands: Iterable[Command]) -> None:
        """Commands reach the endpoint a little later, in order."""

        def carry_out() -> None:
            command = worker.commands.popleft()
            if isinstance(command, SenderCommand):
                worker.sender.command(command, self.now)
                if isinstance(command, Abort):
                    worker.fenced(command.key)
            else:
                worker.receiver.command(command, self.now)

        for command in commands:
            worker.commands.append(command)
            self.on(worker, self.random.random() * 0.1, carry_out)

    def start_transfer(self) -> Key:
        """A router places a request, sometimes upon stale news, or has a worker fetch a prefix."""
        source = self.random.choice(list(self.workers.values()))
        others = [worker for worker in self.workers.values() if worker is not source]
        if self.faults != Faults():
            others += [worker for worker in self.lives[-9:] if worker.id != source.id]
        target = self.random.choice(others)
        self.requests += 1
        is_fetch = self.random.random() < 0.4
        key = Key(self.requests, FETCH if is_fetch else 1)
        num_tokens = self.random.randint(1, 5 * BLOCK_SIZE)
        if is_fetch and source.alive:
            until = self.now + (self.random.uniform(0.1, 5.0) if not source.calm else HEAL_S)
            self.on(
                source,
                0.0,
                lambda: self.order(source, source.fetch(key, target.peer, num_tokens, until)),
            )
        elif source.alive:
            self.on(
                source, 0.0, lambda: self.order(source, source.start(key, target.peer, num_tokens))
            )
        return key

    # ------------------------------------------------------------ faults

    def kill(self, worker: SimulatedWorker) -> None:
        worker.alive, worker.silent_since = False, self.now
        for connection in self.connections():
            if worker in (connection.source, connection.target):
                self.disconnect(connection)
        restart_s = self.random.uniform(0.05, 3.0)
        self.after(restart_s, lambda: self.begin_life(worker.id))

    def pause(self, worker: SimulatedWorker) -> None:
        worker.paused, worker.silent_since = True, self.now
        self._backlog[worker] = []
        pause_s = self.random.uniform(0.1, 3 * TIMERS.lease_s)
        self.after(pause_s, lambda: self.resume(worker, pause_s))

    def resume(self, worker: SimulatedWorker, pause_s: float) -> None:
        if not worker.paused:
            return
        worker.paused, worker.silent_since, worker.active_since = False, None, self.now
        if pause_s > TIMERS.lease_s and self.random.random() < 0.5:
            # It noticed that it was away for too long before it read a message.
            worker.begin_life(self.random.getrandbits(62), self.now)
            self.flush(worker)
        backlog = self._backlog.pop(worker, [])
        if self.random.random() < 0.5:
            self.random.shuffle(backlog)  # its sockets and timers in any order
        for action in backlog:
            action()

    def disconnect(self, connection: Connection) -> None:
        """The connection breaks; the sender's end sees it, the other when it next sends."""
        if not connection.is_open:
            return
        connection.is_open = False
        source, peer = connection.source, connection.peer

        def seen() -> None:
            if self._connections[source].get(peer) is not connection:
                return
            del self._connections[source][peer]
            source.sender.disconnected(peer, self.now)
            source.sender.data_lost(peer, self.now)

        self.on(source, self.random.random() * 0.1, seen)

    def misfortune(self) -> None:
        """What happens in a tenth of a second."""
        faults, random = self.faults, self.random
        for worker in list(self.workers.values()):
            if not worker.alive or worker.paused:
                continue
            if random.random() < faults.kill / 10:
                self.kill(worker)
            elif random.random() < faults.pause / 10:
                self.pause(worker)
        for connection in self.connections():
            if random.random() < faults.disconnect / 10:
                self.disconnect(connection)
            if random.random() < faults.one_way / 10:
                lane = random.choice(["request", "answer", "data"])
                connection.deaf_until[lane] = self.now + random.uniform(0.5, 2 * TIMERS.lease_s)

    # ------------------------------------------------------------ network

    def flush(self, worker: SimulatedWorker) -> None:
        """What `Endpoint` does after every call."""
        for queue in (worker.sender.events, worker.receiver.events):
            while queue:
                worker.emitted(queue.popleft())
        connections, links = self._connections[worker], worker.sender.links
        while worker.sender.outbox:
            peer, request = worker.sender.outbox.popleft()
            connection = connections.get(peer)
            if connection is not None:
                self._send_request(connection, protocol.encode(request))
        while worker.receiver.outbox:
            route, answer = worker.receiver.outbox.popleft()
            connection = self._routes[route]
            if connection.is_open:
                self._send_answer(connection, protocol.encode(answer))
            else:
                worker.receiver.unreachable(route, self.now)
        for peer in connections.keys() - links.keys():
            connections.pop(peer).is_open = False
        for peer, link in links.items():
            if peer not in connections:
                self._connect(worker, peer)
            elif link.ring:
                while (shipment := worker.sender.next_shipment(peer, self.now)) is not None:
                    self._ship(connections[peer], shipment)

    def connections(self) -> list[Connection]:
        return [c for of_one in self._connections.values() for c in of_one.values()]

    def _connect(self, worker: SimulatedWorker, peer: Peer) -> None:
        if (worker, peer) in self._connecting:
            return
        self._connecting.add((worker, peer))

        def attempt() -> None:
            self._connecting.discard((worker, peer))
            target = self.workers[peer.address]
            if peer not in worker.sender.links or peer in self._connections[worker]:
                return
            if not target.alive:
                self._connect(worker, peer)
                return
            route = self.random.randbytes(5)
            connection = Connection(worker, target, peer, route)
            self._routes[route] = self._connections[worker][peer] = connection
            worker.sender.connected(peer, self.now)

        self.on(worker, self.random.uniform(0.01, 0.2), attempt)

    def _deliver(
        self, connection: Connection, lane: str, to: SimulatedWorker, action: Callable[[], None]
    ) -> None:
        """Bring a message over, with the faults of the network."""
        faults, random = self.faults, self.random
        if self.now < connection.deaf_until.get(lane, 0.0):
            return
        if random.random() < (faults.data_drop if lane == "data" else faults.drop):
            return
        for _ in range(2 if random.random() < faults.duplicate else 1):
            at = self.now + random.uniform(0.001, 0.05)
            if random.random() < faults.reorder:
                at += random.random()
            else:
                at = max(at, connection.ready_at.get(lane, 0.0))
                connection.ready_at[lane] = at
            # What a broken connection had brought over already may still be read.
            late = random.random() < 0.3

            def arrive(late: bool = late) -> None:
                if connection.is_open or late:
                    action()

            self.on(to, at - self.now, arrive)

    def _send_request(self, connection: Connection, data: bytes) -> None:
        target = connection.target

        def read() -> None:
            message = protocol.decode_for_receiver(data)
            target.receiver.message(connection.route, message, self.now)

        self._deliver(connection, "request", target, read)

    def _send_answer(self, connection: Connection, data: bytes) -> None:
        source = connection.source

        def read() -> None:
            message = protocol.decode_for_sender(data)
            source.sender.message(connection.peer, message, self.now)

        self._deliver(connection, "answer", source, read)

    def _ship(self, connection: Connection, shipment: Shipment) -> None:
        source, target = connection.source, connection.target
        blocks = [b for start, count in shipment.runs for b in range(start, start + count)]
        header, payload = protocol.encode(shipment.header), source.read(blocks)
        offered = [source.generations[block] for block in blocks]
        damaged = self.random.random() < self.faults.corrupt
        if damaged:
            header, payload = self._damage(header, payload)

        def bytes_now() -> list[bytes | None]:
            """The blocks as whoever copies them finds them; None: not what was offered."""
            if self.way == "shared" and not damaged:
                pairs = zip(blocks, offered, strict=True)
                return [source.read([b]) if source.generations[b] == g else None for b, g in pairs]
            if self.way == "lazy" and not damaged and source.alive and not source.paused:
                live = source.sender.is_live(connection.peer, shipment.header.transfer)
                return split(source.read(blocks) if live else bytes(len(payload)))
            return split(payload)

        def read() -> None:
            try:
                decoded = protocol.decode_header(header)
            except ProtocolError:
                return
            landing = target.receiver.accept(decoded, len(payload), self.now)
            if landing is None:
                return

            def copied() -> None:
                digests = target.write(landing, bytes_now())
                target.receiver.landed(landing, digests, self.now)

            # Some transports copy at once, others take their time.
            if self.random.random() < 0.5:
                copied()
            else:
                self.on(target, self.random.random() * 0.2, copied)

        self._deliver(connection, "data", target, read)

    def _damage(self, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        both = bytearray(header + payload)
        both[self.random.randrange(len(both))] ^= 1 << self.random.randrange(8)
        return bytes(both[: len(header)]), bytes(both[len(header) :])

    # ------------------------------------------------------------ a run

    def run(self) -> None:
        end = FAULTY_S
        while self.now < end:
            if self.random.random() < 0.3:
                self.start_transfer()
            self.misfortune()
            self.run_until(self.now + 0.1)
            self.check_patience()
        self.heal()
        # A late question begins a fetch although all seemed to be over.
        self.run_until(self.now + LATE_S)
        self.settle()
        before = len(self.all_arrived())
        calm = []
        for _ in range(CALM):
            calm.append(self.start_transfer())
            self.run_until(self.now + 1.2)
        self.settle()
        assert len(self.all_arrived()) == before + CALM, "a transfer failed without a fault"
        for key in calm:
            assert any(life.ended.get(key) == "delivered" for life in self.lives), key

    def settle(self) -> None:
        """Let everything come to its end; it must do so in time, and stay so."""
        limit = self.now + HEAL_S
        while not all(w.alive and w.is_idle for w in self.workers.values()) and self.now < limit:
            self.run_until(self.now + 0.5)
            self.leave_a_circle()
        self.run_until(self.now + 0.5)
        for worker in self.workers.values():
            worker.check_idle()
        self.check_delivered()

    def leave_a_circle(self) -> None:
        """Here every worker sends and receives, and so pools that are full of prompts may wait for
        room in each other; then a client gives up. No decode worker of a deployment holds a
        prompt of its own back until another has room."""
        workers = [worker for worker in self.workers.values() if worker.alive]
        waiting = [worker for worker in workers if worker.queue]
        if any(worker.granted for worker in workers) or not all(w.lacks_room for w in waiting):
            return
        holders = [worker for worker in waiting if worker.prompts]
        if holders:
            holder = self.random.choice(holders)
            self.order(holder, holder.cancel_one())

    def heal(self) -> None:
        self.faults = Faults()
        for connection in self.connections():
            connection.deaf_until.clear()
        for worker in list(self.workers.values()):
            worker.calm = True
            if worker.paused:
                self.resume(worker, 0.0)

    def all_arrived(self) -> set[Key]:
        return {key for life in self.lives for key in life.arrived}

    def check_patience(self) -> None:
        """Nobody holds blocks for a peer that has been silent for longer than a lease, or a stall,
        and the time in which its last messages came in."""
        silent = {(w.id, w.epoch): w.silent_since for w in self.lives if w.silent_since is not None}
        for worker in self.workers.values():
            if worker.silent_since is not None:
                continue
            for peer, link in worker.sender.links.items():
                since = max(silent.get((peer.id, peer.epoch), self.now), worker.active_since)
                held = [transfer.key for transfer in link.transfers.values() if transfer.round]
                overdue = self.now - since > TIMERS.lease_s + LATE_S
                assert not (held and overdue), f"{worker.id} keeps {held} for {peer.id}"
            for transfer in worker.receiver._transfers.values():
                source = transfer.source.peer
                since = max(
                    silent.get((source.id, source.epoch), self.now),
                    worker.active_since,
                    transfer.moved_at,
                )
                overdue = self.now - since > TIMERS.stall_s + LATE_S
                assert not overdue, f"{worker.id} waits for {transfer.key} of {source.id}"

    def check_delivered(self) -> None:
        """Whoever was told of success told the truth."""
        arrived = self.all_arrived()
        for life in self.lives:
            for key, how in life.ended.items():
                assert how != "delivered" or key in arrived, key


def simulate(seed: int, faults: Faults | None = None, rests: float = RESTS) -> Simulation:
    """`faults`: these, in place of those that the seed draws; `rests`: of the workers."""
    simulation = Simulation(seed, faults, rests)
    try:
        simulation.run()
    except Exception as error:
        error.add_note(
            f"{simulation.way}, {simulation.faults}, at {simulation.now:.3f} s; replay it:\n"
            + (
                f"    python -m tests.kvtransfer.simulation --start {seed} --seeds 1"
                if faults is None
                else f"    simulate({seed}, {faults}, {rests})"
            )
        )
        raise
    return simulation


def split(data: bytes) -> list[bytes | None]:
    return [data[i : i + BLOCK_BYTES] for i in range(0, len(data), BLOCK_BYTES)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate KV transfers under faults.")
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=1000, help="number of seeds")
    arguments = parser.parse_args()
    for seed in range(arguments.start, arguments.start + arguments.seeds):
        simulate(seed)
    print(f"{arguments.seeds} seeds from {arguments.start}: no violation")


if __name__ == "__main__":
    main()
