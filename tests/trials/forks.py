"""A command of this recipe in a fork of the process that has imported it, so that a start takes tenths of a second.

Import this first: it sets the environment and imports all that the commands need.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
os.environ["OMP_NUM_THREADS"] = "1"

import tests.helpers.preloaded  # noqa: F401
from flash_ladder.processes import Processes
from flash_ladder.training import ranks
from tests.helpers.commands import exit_code, write_to

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120.0  # after which a command counts as hanging
GONE = 10.0  # seconds within which all that it started must have ended too


@dataclass
class End:
    """How a command ended."""

    code: int  # minus the signal's number where one killed it
    said: str  # stdout and stderr
    seconds: float
    left: list[int] = field(default_factory=list)  # its processes that were alive GONE seconds later

    @property
    def lines(self) -> list[str]:
        """What it said, a line each."""
        return [line for line in self.said.replace("\r", "\n").split("\n") if line.strip()]

    def refused(self) -> bool:
        """Whether it ended with one line that begins with "error: " and exit code 2."""
        return self.code == 2 and sum(line.startswith("error: ") for line in self.lines) == 1

    def faults(self) -> Iterator[str]:
        """What no command may do, whatever happens to it."""
        if "Traceback (most recent call last)" in self.said or "\nException ignored in" in self.said:
            yield "traceback"
        if self.seconds >= SECONDS:
            yield "hangs"
        if self.left:
            yield f"{len(self.left)} processes left"


def forked(script: str, arguments: list[str], folder: Path, before: Callable[[], None] = lambda: None) -> End:
    """Runs a command in `folder`, and waits for all that it started. `before` is called in its process, ahead of the command."""

    def work() -> None:
        before()
        sys.argv[:] = [script, *arguments]
        runpy.run_path(str(ROOT / script), run_name="__main__")

    log, start = folder / "said", time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()  # what it starts is found by it
        os.chdir(folder)
        write_to(log, log)
        tempfile.tempdir = str(folder)  # what it does not remove goes with the folder
        os._exit(exit_code(work))
    return _awaited(child, log, start)


def started(script: str, arguments: list[str], folder: Path, strike: Callable[[int], None]) -> End:
    """The same in a new process that imports all itself. `strike` is called with its id."""
    log, start = folder / "said", time.monotonic()
    with log.open("wb") as file:
        command = [sys.executable, str(ROOT / script), *arguments]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=folder, start_new_session=True)
    strike(child.pid)
    child.returncode = 0  # it is waited for here
    return _awaited(child.pid, log, start)


def _awaited(child: int, log: Path, start: float) -> End:
    ended, status = 0, 0
    while not ended and time.monotonic() - start < SECONDS:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not ended:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    seconds, end = time.monotonic() - start, time.monotonic() + GONE
    while (left := in_session(child)) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    said = log.read_text(encoding="utf-8", errors="replace")
    return End(os.waitstatus_to_exitcode(status), said, seconds, left)


def in_session(leader: int) -> list[int]:
    """The processes alive that belong to the session which `leader` began (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


class Second:
    """Rank 1 of a run, forked before rank 0 has threads; stands for the subprocess.Popen of training.ranks.start_another."""

    def __init__(self, script: str) -> None:
        self.returncode: int | None = None
        reads, self.writes = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.writes)
            os._exit(exit_code(lambda: self._work(script, os.read(reads, 1 << 20))))
        os.close(reads)
        ranks.start_another = self.begin  # type: ignore[assignment]

    @staticmethod
    def _work(script: str, given: bytes) -> None:
        """The forked process, with the arguments and the environment that rank 0 gives; it gives none where it ends before."""
        from lightning.pytorch.utilities.rank_zero import rank_zero_only

        if given:
            sys.argv[:], environment = json.loads(given)
            os.environ |= environment
            rank_zero_only.rank = 1  # type: ignore[attr-defined]  # Lightning reads the environment when it is imported
            runpy.run_path(str(ROOT / script), run_name="__main__")

    def begin(self, processes: Processes, rank: int) -> Second:
        """What start_another does."""
        os.write(self.writes, json.dumps([sys.argv, processes.environment(rank) | {"TORCH_CPP_LOG_LEVEL": "ERROR"}]).encode())
        return self

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("rank 1", timeout)
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
