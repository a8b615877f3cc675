"""Warpgroups as threads of which one runs at a time, barriers, and vector clocks, which say what each thread knows to be over."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.hopper.values import HardwareFault

OTHERS_FIRST = 0.2  # probability that a thread which could go on lets another one run
LANDS_EARLY = 0.2  # probability that TMA does an operation before anybody waits for it
LAGS = 0.3  # share of the threads that run only when no other one can
ENDLESS = 1_000_000  # steps

# Actors beside threads: the tensor cores, for a thread's products; TMA, for what it reads for a thread's stores and additions, for
# what it has added, and for what it loads for a barrier.
MMA, BULK, ADDED, LOAD = "the tensor cores", "TMA's store", "TMA's addition", "TMA's load"


class Clock(dict):
    """A vector clock: for each actor, the number of its last operation that the clock's owner knows to be over."""

    def learn(self, other: Clock) -> None:
        for actor, time in other.items():
            if time > self.get(actor, 0):
                self[actor] = time

    def knows(self, other: Clock) -> bool:
        return all(self.get(actor, 0) >= time for actor, time in other.items())


class Abandoned(BaseException):
    """Ends a thread after a fault in another one."""


@dataclass
class Block:
    """What the threads of a block share."""

    number: int
    barriers: dict[int, NamedBarrier] = field(default_factory=dict)
    loads: Clock = field(default_factory=Clock)  # the number of TMA's last load for each barrier


@dataclass(eq=False)
class Thread:
    """A warpgroup, or the producer's warp."""

    name: str
    block: Block
    warps: int
    lags: bool
    clock: Clock = field(default_factory=Clock)
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    until: Callable[[], bool] | None = None  # the condition that it waits for
    awaits: str = ""  # that condition in words
    products: list[Any] = field(default_factory=list)  # in flight
    n_products: int = 0
    n_bulk: int = 0  # stores and additions that TMA was asked for
    unfenced: set[Any] = field(default_factory=set)  # shared memory it has stored to since its last fence
    last_read: tuple[int, int] | None = None  # address and value of another block's number, until the fence after it

    def tell(self, clock: Clock) -> None:
        """Puts all that this thread has done so far into `clock`. What it does later is not in it."""
        clock.learn(self.clock)
        self.clock[self] += 1


@dataclass
class Event:
    """An operation that TMA will do: the `number`-th bulk operation of a thread, or a load (0)."""

    do: Callable[[], None]
    owner: Thread | None = None
    number: int = 0


class Machine:
    """All threads of a launch. The running thread calls `pause`; the seed decides which one goes on."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.alive: list[Thread] = []
        self.events: list[Event] = []
        self.later: list[Callable[[], Any]] = []  # blocks that have not begun
        self.me: Thread | None = None
        self.steps = 0
        self.fault: BaseException | None = None
        self.over = threading.Semaphore(0)
        self.native: list[threading.Thread] = []

    # ---- threads ----

    def start(self, name: str, block: Block, warps: int, parent: Thread | None, body: Callable[[], None]) -> Thread:
        """Makes a thread that knows what its parent knows now. The thread does not run yet."""
        thread = Thread(name, block, warps, lags=self.chance.random() < LAGS)
        if parent:
            parent.tell(thread.clock)
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
        """Runs `body` as `blocks` blocks to their ends, and then does TMA's remaining operations."""
        self.later = [lambda i=i: self.start("the first warpgroup", Block(i), 4, None, body) for i in range(blocks)]
        try:
            for _ in range(min(at_once, blocks)):
                self.later.pop(0)()
            self._choose().turn.release()
            self.over.acquire()
        except BaseException as fault:
            self._fail(fault)
        for native in self.native:
            native.join()
        if self.fault is not None:
            raise self.fault
        self.deliver(lambda event: True)

    def pause(self, until: Callable[[], bool] | None = None, awaits: str = "") -> None:
        """Lets other threads run; returns when `until` holds."""
        me = self.me
        self.steps += 1
        if self.steps > ENDLESS:
            raise HardwareFault(f"no end after {ENDLESS:,} steps")
        if (until is None or until()) and self.chance.random() >= OTHERS_FIRST:
            return
        me.until, me.awaits = until, awaits
        chosen = self._choose()
        if chosen is not me:
            chosen.turn.release()
            me.turn.acquire()
            if self.fault is not None:
                raise Abandoned

    def _choose(self) -> Thread:
        while True:
            ready = [thread for thread in self.alive if thread.until is None or thread.until()]
            if self.events and (not ready or self.chance.random() < LANDS_EARLY):
                self.events.pop(self.chance.randrange(len(self.events))).do()
            elif ready:
                self.me = self.chance.choice([thread for thread in ready if not thread.lags] or ready)
                self.me.until = None
                return self.me
            else:
                waiting = "; ".join(f"{thread.name} of block {thread.block.number} for {thread.awaits}" for thread in self.alive)
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
        """Does now TMA's pending operations that `which` selects, in an order drawn from the seed."""
        now = [event for event in self.events if which(event)]
        self.events = [event for event in self.events if not which(event)]
        self.chance.shuffle(now)
        for event in now:
            event.do()


class MBarrier:
    """A phase ends when `count` have arrived and all bytes that they expect are there (PTX ISA, `mbarrier`).

    A thread that arrives must know that the phase before is over; otherwise it may count in that phase. A thread that waits must
    know that the phase before that one is over; otherwise it may see an older phase's parity. No phase may end before all waiters
    for the last phase have seen its end; otherwise they wait for the next but one. The clocks answer these questions, since the
    order of this run may be a lucky one.
    """

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count, self.pending = name, count, count
        self.bytes, self.phase, self.n_loads = 0, 0, 0
        self.now, self.over = Clock(), Clock()  # what is known of this phase, and of those that are over
        self.came, self.before, self.long_before = Clock(), Clock(), Clock()  # who came in this phase, and in the two before
        self.seen = Clock()  # who has seen the end of the last phase

    def arrive(self, me: Thread, count: int, expected: int = 0) -> None:
        if not me.clock.knows(self.before):
            raise HardwareFault(f"{me.name} arrives at {self.name} and cannot know that its last phase is over")
        self.came[me] = me.clock[me]
        me.tell(self.now)
        self.pending -= count
        if self.pending < 0:
            raise HardwareFault(f"{me.name} arrives at {self.name} when all {self.count} had")
        self.add_bytes(expected)

    def add_bytes(self, n: int) -> None:
        """Expects n more bytes or, if n is negative, takes them in. (A GPU lets them come first; then something else is wrong.)"""
        self.bytes += n
        if self.bytes < 0:
            raise HardwareFault(f"{-self.bytes} bytes come to {self.name} that nobody expected")
        if self.pending == self.bytes == 0:
            late = ", ".join(thread.name for thread, time in self.seen.items() if self.now.get(thread, 0) < time)
            if late:
                raise HardwareFault(f"a phase of {self.name} may end before {late} has seen the last one's end")
            self.seen = Clock()
            self.phase, self.pending, self.over = self.phase + 1, self.count, Clock(self.now)
            self.long_before, self.before, self.came = self.before, self.came, Clock()

    def wait(self, machine: Machine, parity: int) -> None:
        """Waits for the end of the phase of this parity."""
        if parity not in (0, 1):
            raise HardwareFault(f"{machine.me.name} waits for phase {parity} of {self.name}: there are 0 and 1")
        machine.pause(lambda: self.phase % 2 != parity, f"phase {parity} of {self.name}")
        if not machine.me.clock.knows(self.long_before):
            raise HardwareFault(f"{machine.me.name} waits for a phase of {self.name} that may be an older one's parity")
        self.seen[machine.me] = machine.me.clock[machine.me]
        machine.me.clock.learn(self.over)


@dataclass
class Round:
    """A round of a named barrier: which threads have come, whether each waits, and what they know."""

    total: int
    came: dict[Thread, bool] = field(default_factory=dict)
    times: Clock = field(default_factory=Clock)  # the time at which each came
    clock: Clock = field(default_factory=Clock)
    over: bool = False


@dataclass
class NamedBarrier:
    """PTX's `bar`: a thread that arrives goes on, a thread that syncs waits until all have come."""

    round: Round | None = None
    before: Clock = field(default_factory=Clock)  # who came to the round before


def come(machine: Machine, number: int, total: int, *, waits: bool, aligned: bool) -> None:
    """The running thread, with all its warps, comes to a named barrier of its block."""
    me = machine.me
    if not 5 <= number <= 15:
        raise HardwareFault(f"barrier {number} is not free: Triton has 0 to 4, and there are 16")
    barrier = me.block.barriers.setdefault(number, NamedBarrier())
    barrier.round = this = barrier.round or Round(total)
    if me in this.came or not me.clock.knows(barrier.before):
        raise HardwareFault(f"{me.name} comes to barrier {number} again and cannot know that its last round is over")
    if this.total != total:
        raise HardwareFault(f"{me.name} comes to barrier {number} for {total} threads, others for {this.total}")
    if waits and aligned and any(this.came.values()):
        # Warps may do so (PTX ISA, `barrier`: all threads of one warp must be at one instruction); synccheck calls it divergent.
        raise HardwareFault(f"at barrier {number} {me.name} and another one wait at two instructions: bar.sync is for one")
    this.came[me], this.times[me] = waits, me.clock[me]
    me.tell(this.clock)
    n = 32 * sum(thread.warps for thread in this.came)
    if n > total:
        raise HardwareFault(f"{n} threads come to barrier {number}, which is for {total}")
    if n == total:
        this.over, barrier.round, barrier.before = True, None, this.times
    if waits:
        machine.pause(lambda: this.over, f"barrier {number}")
        me.clock.learn(this.clock)
    else:
        machine.pause()
