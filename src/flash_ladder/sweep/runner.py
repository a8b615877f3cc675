"""The loop of a sweep: starts points as GPUs become free, ends those past their limit, and all of them on Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from tqdm import tqdm

from flash_ladder.sweep.gpus import Pool
from flash_ladder.sweep.points import Point, Sweep
from flash_ladder.sweep.process import PointProcess, command_of, outcome, read_result
from flash_ladder.training import metrics

TICK = 0.1  # seconds between two looks at the processes
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REFUSED = 2  # exit code of a run that did not begin


@dataclass(frozen=True)
class Limits:
    """How long a point may take, how long it may take to end, and how many run side by side."""

    seconds: float | None = None
    grace: float = 60.0
    at_once: int | None = None


class Runner:
    """Runs points in processes, as many at once as there are GPUs for; on the CPU one at a time unless told otherwise."""

    def __init__(self, sweep: Sweep, script: list[str], pool: Pool, limits: Limits) -> None:
        self.sweep, self.script, self.pool, self.limits = sweep, script, pool, limits
        self.running: list[PointProcess] = []

    def run(self, gpus_of: dict[int, int]) -> int:
        """Runs the points (their numbers, with how many GPUs each takes); returns the signal that stopped it, or 0."""
        waiting = [point for point in self.sweep.points if point.number in gpus_of]
        names = self.sweep.names()
        width = max(map(len, names.values()), default=0)
        self.names = {number: name.ljust(width) for number, name in names.items()}
        n_done = len(self.sweep.points) - len(waiting)
        total = len(self.sweep.points)
        is_told = False
        with signals() as received, tqdm(total=total, initial=n_done, desc="sweep", unit="point", dynamic_ncols=True) as bar:
            try:
                while self.running or (waiting and not received):
                    for point in [] if received else list(waiting):
                        if self._fits(gpus_of[point.number]):
                            waiting.remove(point)
                            self._start(point, gpus_of[point.number])
                    for process in list(self.running):
                        if process.has_ended():
                            self._settle(process, waiting)
                            bar.n = total - len(waiting) - len(self.running)
                        else:
                            self._end_if_due(process, received)
                    if received and not is_told:
                        is_told = True
                        tqdm.write(f"\nstopping {len(self.running)} points; once more to kill them", file=sys.stderr)
                    self._show(bar)
                    time.sleep(TICK)
            finally:  # whatever goes wrong here, a full disk for one, no process is left alone
                for process in self.running:
                    process.close()
        return received[0] if received else 0

    def _fits(self, n_gpus: int) -> bool:
        """Whether a point may start now."""
        if self.limits.at_once is not None and len(self.running) >= self.limits.at_once:
            return False
        if n_gpus:
            return n_gpus <= len(self.pool.free)
        return self.limits.at_once is not None or all(process.point.gpus for process in self.running)  # the CPU is one device

    def _start(self, point: Point, n_gpus: int) -> None:
        goes_on = self.sweep.make_ready(point)
        folder = self.sweep.folder_of(point)
        point.gpus = self.pool.take(n_gpus) or []
        point.status, point.error, point.exit_code, point.seconds = "running", None, None, None
        command = command_of(point, self.script, folder, goes_on)
        self.running.append(PointProcess(point, folder, command, goes_on))
        self.sweep.save()

    def _end_if_due(self, process: PointProcess, received: list[int]) -> None:
        limit = self.limits.seconds
        if received:
            process.stop("interrupted", self.limits.grace)
            if len(received) > 1:
                process.kill()
        elif process.kill_at is not None or (limit is not None and process.seconds > limit):
            process.stop("timed_out", self.limits.grace)

    def _settle(self, process: PointProcess, waiting: list[Point]) -> None:
        """Records what became of a process. One that could not go on from its checkpoint starts anew."""
        point, seconds = process.point, process.seconds
        code = process.close()
        self.running.remove(process)
        self.pool.give_back(point.gpus)
        status, error = outcome(code, process.folder, process.reason)
        if process.goes_on and code == REFUSED and status == "failed":
            point.status = "waiting"
            waiting.insert(0, point)
        else:
            if status == "timed_out":
                error = f"still running after hydra.launcher.time_limit={(self.limits.seconds or 0) / 60:g} minutes"
            point.status, point.error, point.exit_code, point.seconds = status, error, code, round(seconds, 1)
            tqdm.write(line(point, self.names[point.number], read_result(process.folder)), file=sys.stdout)
        self.sweep.save()

    def _show(self, bar: tqdm) -> None:
        """The bar with what runs now. Its clock moves on a terminal alone: a file would fill with bars."""
        shown = ", ".join(self.names[p.point.number].strip() or str(p.point.number) for p in self.running)
        moved = bar.postfix != shown
        bar.set_postfix_str(shown, refresh=False)
        if moved or (sys.stderr.isatty() and time.time() - bar.last_print_t > 1):
            bar.refresh()


def line(point: Point, name: str, result: dict[str, Any] | None) -> str:
    """What became of a point, in one line."""
    measured = (result or {}).get("metrics", {})
    loss, speed = measured.get(metrics.VAL_LOSS), measured.get(metrics.TOKENS_PER_SECOND)
    words = [f"{point.number:<4} {name}", f"{point.status.replace('_', ' '):13}"]
    words += [f"loss {loss:.4f}"] if loss is not None else []
    words += [f"{speed:,.0f} tokens/s"] if speed is not None else []
    words += [f"{point.seconds:.0f} s"] if point.seconds is not None else []
    return "   ".join(words)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Yields the list of signals to stop that have arrived since. One that was ignored before stays so (nohup, a shell's `&`)."""
    received: list[int] = []

    def receive(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    before: dict[int, Any] = {s: signal.getsignal(s) for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, receive)
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
