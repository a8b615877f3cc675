"""Kills of a tiny run at drawn moments: `python tests/trials/kills.py n=50 seed=0`; two in five are of a run of two processes.

A run is ended by one of seven signals while it starts, in a step, in a validation, while a checkpoint is written or at its end, and
then resumed until it is done. Every kill must leave whole checkpoints and no process, and say a line without a traceback. At the
end metrics.jsonl must hold every step once, with the losses of an uninterrupted run to the bit.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: it has a folder `kernels`, which is a library's name too
from tests.trials import forks  # first: it sets the environment

# isort: split
from flash_ladder import stopping
from flash_ladder.errors import UserError
from flash_ladder.training import archive, run
from flash_ladder.training.checkpoint import read_checkpoint
from flash_ladder.training.module import GPTModule
from tests.helpers.tiny import overrides, tiny_config

STEPS, VAL_EVERY = 16, 4
SIGNALS = (signal.SIGKILL, *stopping.SIGNALS)
# A moment that is a place in the code: its owner, its name, and how often a run comes by. The other two are times.
PLACES: dict[str, tuple[Any, str, int]] = {
    "step": (GPTModule, "training_step", STEPS),
    "validation": (GPTModule, "validation_step", 2 * STEPS // VAL_EVERY),
    "checkpoint": (archive._Hashed, "write", 400),
    "renaming": (archive.os, "fsync", 12),
    "end": (run, "write_sample", 1),
}
SECONDS = {"import": 4.0, "start": 0.7}  # within which it comes; "import" in a process that imports all itself
MOMENTS = (*SECONDS, *PLACES)
LOSSES = ("train/loss", "val/loss")


@dataclass(frozen=True)
class Trial:
    """One kill, as drawn, and what was lost by it."""

    processes: int
    moment: str
    signum: int
    target: str  # which of two processes
    lost: list[str]

    def __str__(self) -> str:
        return f"{self.processes} process(es), {signal.Signals(self.signum).name} in {self.moment}, to {self.target}"


def arguments(folder: Path, processes: int) -> list[str]:
    """The command line of the run."""
    given = overrides(tiny_config(folder, max_steps=STEPS, val_every=VAL_EVERY))
    return [*given, *(["trainer=ddp", "trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu"] * (processes == 2))]


def losses(run_dir: Path) -> list[tuple[str, int, float]]:
    """Every loss that a run recorded: its name, its step and itself."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(name, line["step"], line[name]) for line in lines for name in LOSSES if name in line]


def go(given: list[str], folder: Path, processes: int, arm: Callable[[Callable[[], list[int]]], None] | None = None) -> forks.End:
    """Runs train.py in a fork. `arm` gets a function that says which processes the run has."""

    def before() -> None:
        second = forks.Second("train.py") if processes == 2 else None
        if arm is not None:
            arm(lambda: [os.getpid()] + ([second.pid] if second is not None else []))

    return forks.forked("train.py", given, folder, before)


def tried(drawn: tuple[str, str, int, Path, list[tuple[str, int, float]]]) -> Trial:
    """Kills a run once, and resumes it until it is done."""
    seed, moment, processes, base, expected = drawn
    draw = random.Random(seed)
    signum = draw.choice(SIGNALS)
    target = draw.choice(("first", "second", "all")) if processes == 2 and moment not in SECONDS else "first"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = [*arguments(base, processes), f"hydra.run.dir={folder / 'run'}"]
        if moment == "import":
            end = forks.started("train.py", given, folder, lambda pid: _later(draw.uniform(0.3, SECONDS[moment]), pid, signum))
        else:
            end = go(given, folder, processes, lambda pids: _arm(draw, moment, signum, target, pids))
        if end.code == 0 and not [*end.faults()]:  # the run had ended before
            return tried((f"{seed}'", *drawn[1:]))
        lost = [*end.faults(), *_said(end, signum, target), *_torn(folder / "run")]
        if _is_done(folder / "run"):
            pass
        elif any((folder / "run" / "checkpoints").glob("[!.]*.ckpt")):
            lost += _resumed(folder, processes)
        else:  # it came to no checkpoint, and begins anew
            refused = go([f"resume={folder / 'run'}"], folder, processes)
            lost += [*refused.faults()] + ([] if refused.refused() else [f"resume without a checkpoint: {refused.lines[-1:]}"])
            given[-1] = f"hydra.run.dir={folder / 'anew'}"
            again = go(given, folder, processes)
            lost += [*again.faults()] + ([] if again.code == 0 else [f"begun anew: {again.lines[-1:]}"])
        ended = folder / "anew" if (folder / "anew").exists() else folder / "run"
        if not lost and losses(ended) != expected:
            lost.append("other losses, or other steps")
        if lost:
            lost.append(" | ".join(end.lines[-6:]))
        return Trial(processes, moment, signum, target, lost)


def _arm(draw: random.Random, moment: str, signum: int, target: str, pids: Callable[[], list[int]]) -> None:
    """Lets this process send the signal once the moment comes."""

    def strike() -> None:
        chosen = {"first": slice(0, 1), "second": slice(1, 2), "all": slice(None, None, -1)}[target]  # itself last
        for pid in pids()[chosen]:
            os.kill(pid, signum)

    if moment in SECONDS:
        begins, seconds = stopping.ends_at_once, draw.uniform(0.0, SECONDS[moment])

        def begin() -> None:
            begins()
            threading.Timer(seconds, strike).start()

        stopping.ends_at_once = begin
        return
    owner, name, times = PLACES[moment]
    real, left, own = getattr(owner, name), iter(range(draw.randrange(times))), os.getpid()

    def counted(*args: Any, **kwargs: Any) -> Any:
        if os.getpid() == own and next(left, None) is None and not struck:
            struck.append(True)
            strike()
        return real(*args, **kwargs)

    struck: list[bool] = []
    setattr(owner, name, counted)


def _later(seconds: float, pid: int, signum: int) -> None:
    time.sleep(seconds)
    os.kill(pid, signum)


def _said(end: forks.End, signum: int, target: str) -> Iterator[str]:
    """What is wrong with the exit code and the words of a run that was killed."""
    name = signal.Signals(signum).name
    if signum == signal.SIGKILL:
        codes, words = ({-signum}, "") if target != "second" else ({1}, "error: rank 1")
    else:
        codes, words = {128 + signum}, f"stopped by {name}"
        if target == "second" and end.code == 1:  # before or after training, where the processes do not ask each other
            codes, words = {1}, "error: rank 1"
    if end.code not in codes:
        yield f"exit code {end.code}"
    if words not in end.said.replace("stopped at once by", "stopped by"):
        yield "no word of it"
    if sum(line.startswith(("error:", "stopped ")) for line in end.lines) > 1:
        yield "more than one line"


def _torn(run_dir: Path) -> Iterator[str]:
    """What a kill has torn."""
    for path in (run_dir / "checkpoints").glob("[!.]*.ckpt"):
        try:
            read_checkpoint(path)
        except UserError as error:
            yield str(error)
    if (run_dir / "metrics.jsonl").exists():
        try:
            [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]]
        except ValueError:
            yield "a torn line in metrics.jsonl"


def _is_done(run_dir: Path) -> bool:
    path = run_dir / "result.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


def _resumed(folder: Path, processes: int) -> list[str]:
    end = go([f"resume={folder / 'run'}"], folder, processes)
    lost = [*end.faults()]
    return lost + ([] if end.code == 0 else [f"resume: exit code {end.code}: {' | '.join(end.lines[-3:])}"])


def main(n: int, seed: int, show: Callable[[str], None] = print) -> int:
    """Kills `n` runs, and says what was lost; returns in how many of them something was."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        expected = {}
        for processes in (1, 2):
            given = [*arguments(base, processes), f"hydra.run.dir={base / str(processes)}"]
            end = go(given, base, processes)
            assert end.code == 0, end.said
            expected[processes] = losses(base / str(processes))
        drawn = []
        for i in range(n):
            processes = 1 + (i % 5 in (1, 3))
            drawn.append((f"{seed}/{i}", MOMENTS[i % len(MOMENTS)], processes, base, expected[processes]))
        kills: Counter[tuple[str, int]] = Counter()
        lost: Counter[tuple[str, int]] = Counter()
        with get_context("fork").Pool(2) as pool:
            for trial in pool.imap_unordered(tried, drawn, chunksize=1):
                kills[trial.moment, trial.processes] += 1
                if trial.lost:
                    lost[trial.moment, trial.processes] += 1
                    show(f"{trial}: {'; '.join(trial.lost)}")
    show(f"{'':12}{'one process':>16}{'two processes':>16}{'lost':>8}")
    for moment in MOMENTS:
        show(f"{moment:12}{kills[moment, 1]:16}{kills[moment, 2]:16}{lost[moment, 1] + lost[moment, 2]:8}")
    show(f"{kills.total()} kills (seed {seed}), {lost.total()} with something lost")
    return lost.total()


if __name__ == "__main__":
    values = {"n": 50, "seed": 0} | {key: int(value) for key, _, value in (argument.partition("=") for argument in sys.argv[1:])}
    sys.exit(1 if main(**values) else 0)
