"""Warpgroups as threads of which one runs at a time, barriers, and who knows of what: vector clocks."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.hopper.values import HardwareFault

OTHERS_FIRST = 0.2  # how often a thread that could go on lets another one run
LANDS_EARLY = 0.2  # how often something that TMA was asked for is done before anybody waits for it
# Actors beside threads: their products, what TMA stores or adds for them, and what it loads for a barrier.
MMA, BULK, LOAD = "the tensor cores", "TMA's store", "TMA's load"


class Clock(dict):
    """Of each actor, up to which of its doings somebody knows that they are over."""

    def learn(self, other: Clock) -> None:
        for actor, time in other.items():
            if time > self.get(actor, 0):
                self[actor] = time


class Abandoned(BaseException):
    """Ends a thread after a fault in another."""


@dataclass(eq=False)
class Thread:
    """A warpgroup, or the producer's warp."""

    name: str
    block: int
    warps: int
    clock: Clock
    barriers: dict[int, NamedBarrier]  # the block's
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    until: Callable[[], bool] | None = None  # what it waits for
    awaits: str = ""  # the same in words
    products: list[Any] = field(default_factory=list)  # in flight
    n_products: int = 0
    n_bulk: int = 0  # stores and additions that TMA was asked for
    unfenced: set[Any] = field(default_factory=set)  # shared memory it has stored to since its last fence
    read_global: bool = False  # another block's number, since the last fence
    last_read: tuple[int, int] | None = None

    def tell(self, clock: Clock) -> None:
        """Whoever learns from that clock knows of all that this thread has done; not of what it will do."""
        clock.learn(self.clock)
        clock[self] = self.clock[self]
        self.clock[self] += 1


@dataclass
class Event:
    """Something that TMA will have done: the `number`-th of a thread's bulk operations, or a load (0)."""

    do: Callable[[], None]
    owner: Thread | None = None
    number: int = 0


class Machine:
    """All threads of a launch. The one that runs calls `pause`; who goes on is drawn from the seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.alive: list[Thread] = []
        self.events: list[Event] = []
        self.me: Thread | None = None
        self.fault: BaseException | None = None
        self.released: dict[int, Clock] = {}  # by address of a number in global memory
        self.over = threading.Semaphore(0)
        self.native: list[threading.Thread] = []
        self.later: list[Callable[[], Any]] = []  # blocks that have not begun

    # ---- threads ----

    def start(self, name: str, block: int, warps: int, parent: Thread | None, body: Callable[[], None]) -> Thread:
        """A thread, which knows what its parent knows. It does not run yet."""
        clock = Clock(parent.clock) if parent else Clock()
        thread = Thread(name, block, warps, clock, parent.barriers if parent else {})
        thread.clock[thread] = 1

        def run() -> None:
            thread.turn.acquire()
            try:
                if self.fault is None:
                    body()
                    self._at_end(thread)
                    self.alive.remove(thread)
                    if parent is None and self.later:
                        self.later.pop(0)()
                    if self.alive:
                        self._choose().turn.release()
                    else:
                        self.over.release()
            except Abandoned:
                pass
            except BaseException as fault:
                self._fail(fault)

        self.alive.append(thread)
        self.native.append(threading.Thread(target=run, daemon=True))
        self.native[-1].start()
        return thread

    def run(self, body: Callable[[], None], blocks: int, at_once: int) -> None:
        """Runs `body` as so many blocks, to their ends, and then what TMA has still to do."""
        self.later = [lambda i=i: self.start("the first warpgroup", i, 4, None, body) for i in range(blocks)]
        for _ in range(min(at_once, blocks)):
            self.later.pop(0)()
        try:
            self._choose().turn.release()
            self.over.acquire()
        finally:
            for native in self.native:
                native.join()
        if self.fault is not None:
            raise self.fault
        self.deliver(lambda event: True)

    def pause(self, until: Callable[[], bool] | None = None, awaits: str = "") -> None:
        """Lets others run; comes back when `until` holds."""
        me = self.me
        if (until is None or until()) and self.chance.random() >= OTHERS_FIRST:
            return
        me.until, me.awaits = until, awaits
        chosen = self._choose()
        if chosen is not me:
            chosen.turn.release()
            me.turn.acquire()
            if self.fault is not None:
                raise Abandoned
        self.me = me

    def _choose(self) -> Thread:
        while True:
            ready = [thread for thread in self.alive if thread.until is None or thread.until()]
            if self.events and (not ready or self.chance.random() < LANDS_EARLY):
                self.events.pop(self.chance.randrange(len(self.events))).do()
            elif ready:
                self.me = self.chance.choice(ready)
                self.me.until = None
                return self.me
            else:
                waiting = "; ".join(f"{thread.name} of block {thread.block} for {thread.awaits}" for thread in self.alive)
                raise HardwareFault(f"a hang: nobody can go on. {waiting}")

    def _fail(self, fault: BaseException) -> None:
        self.fault = self.fault or fault
        for thread in self.alive:
            thread.turn.release()
        self.over.release()

    def _at_end(self, thread: Thread) -> None:
        if thread.products:
            raise HardwareFault(f"{thread.name} ends with a product that nobody awaits")
        if thread.clock.get((thread, BULK), 0) < thread.n_bulk:
            raise HardwareFault(f"{thread.name} ends while TMA may still read what it stores")

    # ---- what TMA does later ----

    def deliver(self, which: Callable[[Event], bool]) -> None:
        """Does now what TMA was asked for, of what `which` says, in an order drawn from the seed."""
        now = [event for event in self.events if which(event)]
        self.events = [event for event in self.events if not which(event)]
        self.chance.shuffle(now)
        for event in now:
            event.do()


class MBarrier:
    """A phase ends when `count` have arrived and all bytes that they expect are there (PTX ISA, `mbarrier`)."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count, self.pending = name, count, count
        self.bytes, self.phase, self.n_loads = 0, 0, 0
        self.now, self.over = Clock(), Clock()  # what is known of this phase, and of those that are over

    def arrive(self, me: Thread, count: int, expected: int = 0) -> None:
        me.tell(self.now)
        self.pending -= count
        if self.pending < 0:
            raise HardwareFault(f"{me.name} arrives at {self.name} when all {self.count} had")
        self.add_bytes(expected)

    def add_bytes(self, n: int) -> None:
        """Expected ones, or less those that have come."""
        self.bytes += n
        if self.bytes < 0:
            raise HardwareFault(f"{-self.bytes} bytes come to {self.name} that nobody expected")
        if self.pending == self.bytes == 0:
            self.phase, self.pending, self.over = self.phase + 1, self.count, Clock(self.now)

    def wait(self, machine: Machine, parity: int) -> None:
        """For the end of the phase of this parity."""
        machine.pause(lambda: self.phase % 2 != parity, f"phase {parity} of {self.name}")
        machine.me.clock.learn(self.over)


@dataclass
class NamedBarrier:
    """PTX's `bar`: whoever arrives goes on, whoever syncs waits until `total` threads have come."""

    total: int = 0
    came: dict[Thread, bool] = field(default_factory=dict)  # and whether they wait
    round: int = 0
    now: Clock = field(default_factory=Clock)
    over: Clock = field(default_factory=Clock)


def come(machine: Machine, number: int, total: int, waits: bool, aligned: bool) -> None:
    """The running thread, with all its warps, comes to a named barrier of its block."""
    me = machine.me
    if not 5 <= number <= 15:
        raise HardwareFault(f"barrier {number} is not free: Triton has 0 to 4, and there are 16")
    barrier = me.barriers.setdefault(number, NamedBarrier())
    if me in barrier.came:
        raise HardwareFault(f"{me.name} comes to barrier {number} again before its round is over")
    if barrier.came and barrier.total != total:
        raise HardwareFault(f"{me.name} comes to barrier {number} for {total} threads, others for {barrier.total}")
    if waits and aligned and any(barrier.came.values()):
        raise HardwareFault(f"at barrier {number} {me.name} and another one wait at two instructions: bar.sync is for one")
    barrier.total, barrier.came[me] = total, waits
    me.tell(barrier.now)
    n = 32 * sum(thread.warps for thread in barrier.came)
    if n > total:
        raise HardwareFault(f"{n} threads come to barrier {number}, which is for {total}")
    this = barrier.round
    if n == total:
        barrier.came, barrier.round, barrier.over = {}, this + 1, Clock(barrier.now)
    if waits:
        machine.pause(lambda: barrier.round > this, f"barrier {number}")
        me.clock.learn(barrier.over)
    else:
        machine.pause()
