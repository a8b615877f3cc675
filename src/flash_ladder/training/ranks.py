"""The processes of a run, one a device: the first one starts the others, they meet, and one that is lost ends the run by name.

A collective waits for every process, and for one that is gone it waits until its time-out. So a thread in each process (Watch)
looks every second whether the others of its node still live, and tells the first process that it lives itself. What the
processes know of each other is in a TCPStore, which the first one holds, or torchrun's agent.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flash_ladder import stopping
from flash_ladder.errors import UserError, first_line
from flash_ladder.machine.decide import Place
from flash_ladder.processes import MARGIN_SECONDS, PARENT, Processes, end_with_parent
from flash_ladder.schema import Config
from flash_ladder.training.result import OutOfMemory

LOOK_SECONDS = 1.0  # between two looks of the watch
GRACE_SECONDS = 5.0  # that a process gets to end by itself once another one is lost

# What torch raises where another process of a collective is gone or late.
COLLECTIVE = re.compile(r"gloo|NCCL|connection|timed? ?out|broken pipe|peer", re.IGNORECASE)
LATE = re.compile(r"timed? ?out", re.IGNORECASE)


@dataclass(frozen=True)
class Lost:
    """A process that the run cannot go on without, and what became of it."""

    rank: int
    how: str
    of_memory: bool = False  # it had no memory left


class RankLost(UserError):
    """Another process of this run died, failed or does not answer."""

    exit_code = 1


class Ranks:
    """This process among those of its run. Every method may be called in a run of one process, where it does nothing.

    Use: `Ranks(cfg, place)` starts the others, `join` meets them, `failed` says what to raise where something was raised, and
    `leave` is called at every end.
    """

    def __init__(self, cfg: Config, place: Place) -> None:
        self.timeout = cfg.trainer.timeout_seconds
        self.device = place.device
        self.processes = place.processes
        self.others: list[subprocess.Popen] = []  # that this process started
        self.watch: Watch | None = None
        self.is_lost = False
        if self.processes is None and (place.n_devices > 1 or cfg.trainer.strategy != "auto"):
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            self.processes = Processes("train.py", 0, 0, place.n_devices, 1, "127.0.0.1", self.store.port)
            self.others = [start_another(self.processes, rank) for rank in range(1, place.n_devices)]
        if self.processes is not None:
            self.watch = Watch(self.processes, self.others, self.timeout)
            self.watch.start()
            end_with_parent(False)

    def join(self, cfg: Config, on_lost: Callable[[UserError], None]) -> None:
        """Waits for all processes and makes the process group.

        on_lost: called in another thread where another process is lost and this one hangs, before it is ended.
        Raises UserError where the processes have different configurations.
        """
        here = self.processes
        if here is None or self.watch is None:
            return
        self.watch.on_lost = on_lost
        if not hasattr(self, "store"):
            # Under torchrun the store is its agent's, and outlives a restart of the processes.
            holds = here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            self.store = connect(here, self.timeout, is_master=holds)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # what a process sends to the others goes through its current GPU
        start = f"flash_ladder/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._wait_for_all(dist.PrefixStore(f"{start}/here", self.store), here)
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"{start}/group", self.store),
            rank=here.rank,
            world_size=here.n,
            timeout=timedelta(seconds=self.timeout + MARGIN_SECONDS),
            device_id=self.device if self.device.type == "cuda" else None,
        )
        # The watch has a connection of its own: a wait on the group's would make it wait too.
        self.watch.meet(dist.PrefixStore(f"{start}/watch", connect(here, self.timeout, is_master=False)), json.dumps(asdict(cfg)))

    def _wait_for_all(self, store: dist.Store, here: Processes) -> None:
        """Returns once all processes are here. Unlike torch's own wait, this one ends on a signal and where a process is lost."""
        assert self.watch is not None
        store.set(str(here.rank), "1")
        end = time.monotonic() + self.timeout
        while not store.check([str(rank) for rank in range(here.n)]):
            if self.watch.known.wait(0.05):
                raise RuntimeError("the connection to another process is lost")  # `failed` says to which
            if time.monotonic() > end:
                late = next(rank for rank in range(here.n) if not store.check([str(rank)]))
                raise RankLost(f"rank {late} has not started within {self.timeout:.0f} s (trainer.timeout_seconds)")

    def failed(self, error: BaseException) -> BaseException:
        """What to raise instead of `error`, which ends the run: one that names another process where that is the reason.

        The other processes are told, and those that this one started are killed.
        """
        if self.watch is None:
            return error
        lost = self.watch.reason(error)
        for other in self.others:
            other.kill()
        if lost is None:
            return error
        self.is_lost = True
        # Without this, a process whose group is broken may hang when Python takes it down.
        faulthandler.dump_traceback_later(2 * GRACE_SECONDS, exit=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
        return self.watch.error(lost) if self.watch.speaks(lost) else SystemExit(RankLost.exit_code)

    def leave(self) -> None:
        """Says goodbye, so that the others do not take this process for dead; the first one waits until all have."""
        if self.watch is None:
            return
        self.watch.leave()
        for other in self.others:
            with contextlib.suppress(subprocess.TimeoutExpired):
                other.wait(GRACE_SECONDS)
            other.kill()
        if dist.is_initialized() and not self.is_lost and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def start_another(processes: Processes, rank: int) -> subprocess.Popen:
    """Starts this program once more, with the same arguments, as process `rank` of this node."""
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), *sys.argv[1:]]
    quiet = {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}  # no stack traces of a store that is gone
    return subprocess.Popen(command, env=os.environ | processes.environment(rank) | quiet, stdin=subprocess.DEVNULL)


def connect(processes: Processes, timeout: float, is_master: bool) -> dist.TCPStore:
    """A connection to the store of the run; the master holds it."""
    return dist.TCPStore(
        processes.address, processes.port, is_master=is_master, wait_for_workers=False, timeout=timedelta(seconds=timeout)
    )


class Watch(threading.Thread):
    """Looks every LOOK_SECONDS whether the other processes live, and ends this one where one is lost and it hangs.

    A process of this node that is gone is seen at once. One that does not answer (stopped, or its node is gone) is lost after
    `timeout` seconds; the first process decides that. Its verdict, or that of a process that fails, goes to all by the store.
    """

    def __init__(self, processes: Processes, others: list[subprocess.Popen], timeout: float) -> None:
        super().__init__(daemon=True, name="watch")
        self.processes, self.others, self.timeout = processes, others, timeout
        self.parent = int(os.environ[PARENT]) if processes.by == "train.py" and processes.rank else None
        self.store: dist.Store | None = None  # from `meet` on
        self.peers: list[dict[str, Any]] = []  # {"pid", "host"} of every rank
        self.beats: list[tuple[bytes, float]] = []  # of every rank: its last one, and when it came
        self.count = 0
        self.lost: Lost | None = None
        self.known = threading.Event()  # `lost` is set
        self.taken = threading.Event()  # the main thread has seen it, and ends the process
        self.left = threading.Event()
        self.on_lost: Callable[[UserError], None] | None = None  # called before the process is ended

    # ---- called by the main thread ----

    def meet(self, store: dist.Store, config: str) -> None:
        """Tells the others who this process is, and learns who they are."""
        store.set("verdict", "")
        self._beat(store)
        about = {"pid": os.getpid(), "host": socket.gethostname(), "config": config}
        everyone: list[Any] = [None] * self.processes.n
        dist.all_gather_object(everyone, about)
        different = [rank for rank, other in enumerate(everyone) if other["config"] != everyone[0]["config"]]
        if different:
            raise UserError(f"rank {different[0]} has another configuration than rank 0; start all with the same arguments")
        self.peers = everyone
        self.beats = [(b"", time.monotonic())] * self.processes.n
        self.store = store

    def reason(self, error: BaseException) -> Lost | None:
        """The lost process that made this one fail with `error`; None where it failed by itself, which the others are told."""
        if isinstance(error, RuntimeError) and COLLECTIVE.search(str(error)):
            if not self.known.wait(GRACE_SECONDS) and self.store is not None and LATE.search(str(error)):
                self._decide(self._late(self.store))
            if self.lost is not None:
                self.taken.set()
                return self.lost
        if self.known.is_set():
            self.taken.set()
        self._tell(Lost(self.processes.rank, f"failed: {first_line(error)}", isinstance(error, OutOfMemory)))
        return None

    def leave(self) -> None:
        """Ends the watch. The first process waits for the others, because the store ends with it."""
        self.left.set()
        # A thread that is inside the store when Python goes down would end the process by SIGABRT.
        self.join(GRACE_SECONDS)
        if self.store is None or self.lost is not None:
            return
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left/{self.processes.rank}", "1")
            end = time.monotonic() + GRACE_SECONDS
            while self.processes.rank == 0 and self.lost is None and time.monotonic() < end:
                if all(self._has_left(rank) for rank in range(self.processes.n)):
                    break
                time.sleep(0.05)

    def speaks(self, lost: Lost) -> bool:
        """Whether this process is the one that says so on the screen."""
        return self.processes.rank == (1 if lost.rank == 0 else 0)

    def error(self, lost: Lost) -> UserError:
        """What became of a process."""
        where = ""
        if self.peers:
            where = f" (process {self.peers[lost.rank]['pid']} on {self.peers[lost.rank]['host']})"
        elif 0 < lost.rank <= len(self.others):
            where = f" (process {self.others[lost.rank - 1].pid})"
        return (OutOfMemory if lost.of_memory else RankLost)(f"rank {lost.rank}{where} {lost.how}")

    # ---- the thread ----

    def run(self) -> None:
        while not self.left.wait(LOOK_SECONDS):
            try:
                lost = self._look()
            except RuntimeError:  # of the store, which ends with the first process
                lost = None if self.left.is_set() else Lost(0, "has died: the connection to it broke")
            if lost is not None:
                self._decide(lost)
                if not self.taken.wait(GRACE_SECONDS) and not self.left.is_set():
                    self._end(lost)
                return

    def _look(self) -> Lost | None:
        for rank, other in enumerate(self.others, start=1):
            if other.poll() and not self._has_left(rank):  # an exit code other than 0
                return self._verdict() or Lost(rank, how_it_ended(other.returncode))
        if self.parent is not None and os.getppid() != self.parent:
            return Lost(0, "has died")
        if self.store is None:
            return None
        self._beat(self.store)
        if verdict := self._verdict():
            return verdict
        for rank, peer in enumerate(self.peers):
            if 0 < rank <= len(self.others) and self.others[rank - 1].poll() is None:
                continue  # one that this process started: its exit code, which says how it died, comes with the next look
            if peer["host"] == socket.gethostname() and not is_alive(peer["pid"]) and not self._has_left(rank):
                return self._verdict() or Lost(rank, "has died")
        return self._silent(self.store) if self.processes.rank == 0 else None

    def _silent(self, store: dist.Store) -> Lost | None:
        """A process whose last sign of life is older than `timeout`."""
        now = time.monotonic()
        beats = store.multi_get([f"beat/{rank}" for rank in range(self.processes.n)])
        for rank, beat in enumerate(beats):
            last, since = self.beats[rank]
            if beat != last:
                self.beats[rank] = (beat, now)
            elif now - since > self.timeout and not self._has_left(rank):
                return Lost(rank, f"has not answered for {now - since:.0f} s (trainer.timeout_seconds)")
        return None

    def _late(self, store: dist.Store) -> Lost:
        """Who let this process wait in a collective until its time-out: one that does not wait in it as well."""
        store.set(f"waited/{self.processes.rank}", "1")
        time.sleep(GRACE_SECONDS)
        late = [rank for rank in range(self.processes.n) if not store.check([f"waited/{rank}"])]
        how = f"has let the others wait in a collective for {self.timeout + MARGIN_SECONDS:.0f} s"
        return Lost(late[0] if late else self.processes.rank, how)

    def _beat(self, store: dist.Store) -> None:
        self.count += 1
        store.set(f"beat/{self.processes.rank}", str(self.count))

    def _has_left(self, rank: int) -> bool:
        return self.store is not None and self.store.check([f"left/{rank}"])

    def _verdict(self) -> Lost | None:
        said = self.store.get("verdict") if self.store is not None else b""
        return Lost(**json.loads(said)) if said else None

    def _tell(self, lost: Lost) -> None:
        """Tells the others, unless they know of another one."""
        if self.store is not None and lost.rank != 0:  # with the first process the store is gone
            with contextlib.suppress(RuntimeError):
                self.store.compare_set("verdict", "", json.dumps(asdict(lost)))

    def _decide(self, lost: Lost) -> None:
        self.lost = lost
        self._tell(lost)
        self.known.set()

    def _end(self, lost: Lost) -> None:
        """Ends the process, whose main thread hangs in a collective, and those that it started."""
        if self.speaks(lost):
            print(f"\nerror: {self.error(lost)}", file=sys.stderr, flush=True)
        for other in self.others:
            other.kill()
        if self.on_lost is not None:
            self.on_lost(self.error(lost))
        os._exit(RankLost.exit_code)


def how_it_ended(code: int) -> str:
    """The words for a process that ended with `code`, as subprocess counts: −9 is signal 9."""
    if code < 0:
        return f"has died ({signal.Signals(-code).name})"
    if code - 128 in stopping.SIGNALS:
        return f"was stopped by {signal.Signals(code - 128).name}"
    return f"has ended with exit code {code}; its own message is above"


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs (Linux). One that ended and that nobody has asked for since does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return False
