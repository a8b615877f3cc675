"""The process of one point: its start, its end, whoever brings that about, and what its end says about the point."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from flash_ladder.files import json_of
from flash_ladder.names import FAILED, FINISHED, NOT_FINITE, OUT_OF_MEMORY, STOPPED
from flash_ladder.overrides import as_typed, quoted, to_type_again
from flash_ladder.sweep.points import GOOD, Point, Sweep

CONSOLE = "console.log"
WANDB_LONGEST = 128  # characters of a run's name in wandb
RESULTS = (FINISHED, OUT_OF_MEMORY, NOT_FINITE, STOPPED, FAILED)  # what result.json may say


class PointProcess:
    """A point's process, in a session of its own, so that it and all that it starts can be ended together.

    Its output goes to console.log in the point's folder, which stays locked as long as anything of it lives.
    """

    def __init__(self, point: Point, folder: Path, command: list[str], goes_on: bool) -> None:
        """Starts it on the GPUs of `point.gpus`, the only ones it sees. goes_on: it resumes an earlier start."""
        self.point, self.folder, self.goes_on = point, folder, goes_on
        self.reason: str | None = None  # the status that whoever ended it gives
        self.kill_at: float | None = None
        self.log = (folder / CONSOLE).open("ab")
        fcntl.flock(self.log, fcntl.LOCK_EX)
        self.start = time.monotonic()
        self.popen = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, point.gpus)), "PYTHONUNBUFFERED": "1"},
        )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def has_ended(self) -> bool:
        """Whether the first process is gone. Until `close` its number stays taken, so that the rest can be killed by it."""
        ended = os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return ended is not None

    def stop(self, reason: str, grace: float) -> None:
        """Asks it to stop, and kills it and all it started where it is still there `grace` seconds later."""
        if self.kill_at is None:
            self.reason, self.kill_at = reason, time.monotonic() + grace
            os.kill(self.popen.pid, signal.SIGTERM)  # a run stops between two steps, and takes its other ranks with it
        elif time.monotonic() >= self.kill_at:
            self.kill()

    def kill(self) -> None:
        """Kills it and all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)

    def close(self) -> int:
        """Kills what it left behind, and returns its exit code (a signal that ended it: negative)."""
        self.kill()  # ranks that wait for a dead one would hold their GPUs for ever
        code = self.popen.wait()
        self.log.close()
        return code


def still_runs(folder: Path) -> bool:
    """Whether anything of a point's process lives on, its sweep having been killed."""
    try:
        with (folder / CONSOLE).open("ab") as log:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def command_of(point: Point, script: list[str], folder: Path, goes_on: bool) -> list[str]:
    """What to type for one point: train.py with its own values, or with resume= where it goes on.

    script: train.py and what Hydra needs to find the same configuration files.
    """
    numbered = [f"hydra.job.num={point.number}", f"hydra.job.id={point.number}"]
    if goes_on:
        return [*script, *numbered, f"resume={folder}", *map(as_typed, to_type_again(point.overrides))]
    return [*script, *map(as_typed, point.overrides), *numbered, f"hydra.run.dir={quoted(str(folder))}"]


def labels(point: Point, sweep: Sweep) -> list[str]:
    """wandb's names for one point: the sweep's DATE/TIME as its group, and what sets it apart as its name.

    What the user names, as a key or as wandb's environment variable, is left alone.
    """
    asked = {override.partition("=")[0] for override in point.overrides}
    found = {"group": "/".join(sweep.folder.resolve().parts[-2:]), "name": sweep.names()[point.number][:WANDB_LONGEST]}
    variables = {"group": "WANDB_RUN_GROUP", "name": "WANDB_NAME"}
    return [
        f"logger.{key}={value}"
        for key, value in found.items()
        if value and f"logger.{key}" not in asked and variables[key] not in os.environ
    ]


# ---- what became of it ----


def read_result(folder: Path) -> dict[str, Any] | None:
    """The run's result.json; None where it is missing or was not written whole."""
    try:
        result = json_of((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("status") in RESULTS else None


def outcome(exit_code: int, folder: Path, reason: str | None) -> tuple[str, str | None]:
    """The status and the error of a point whose process has ended.

    reason: the status that whoever ended it gives (timed_out, interrupted); None where nobody did. A run that had finished all the
    same is finished.
    """
    result = read_result(folder)
    if result is not None and (reason is None or result["status"] in GOOD):
        return result["status"], result.get("error")
    if reason is not None:
        return reason, None
    if exit_code == 0:
        return FINISHED, None
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        return "killed", f"killed by {name}" + ("; the system's out-of-memory killer does so" if name == "SIGKILL" else "")
    if exit_code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return STOPPED, f"stopped by {signal.Signals(exit_code - 128).name}"
    return FAILED, last_error(folder / CONSOLE) or f"exit code {exit_code}"


def last_error(console: Path) -> str | None:
    """The last line of a log that begins with "error: ", or its last line (of a traceback, say); None for an empty one."""
    with console.open("rb") as file:
        file.seek(max(0, console.stat().st_size - 2**16))
        lines = [line.rsplit("\r", 1)[-1].strip() for line in file.read().decode(errors="replace").split("\n")]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    spoken = [line for line in lines if line]
    return next(reversed(errors or spoken), None)
