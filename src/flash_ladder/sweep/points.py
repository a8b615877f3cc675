"""A sweep's record, points.json: what was asked for, and what has become of every point.

It is written whole after every change, so that whatever ends a sweep leaves what is done, and `sweep=FOLDER` goes on from it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flash_ladder.errors import UserError, argument
from flash_ladder.files import read_json, write_json
from flash_ladder.names import FINISHED, OUT_OF_MEMORY
from flash_ladder.overrides import differing

RECORD = "points.json"
LOCK = ".points.lock"
GOOD = (FINISHED, OUT_OF_MEMORY)  # out of memory is what some sweeps are run to find
ENDED_FROM_OUTSIDE = ("running", "interrupted", "killed", "timed_out", "stopped")  # training itself had not come to an end


@dataclass
class Point:
    """One run of a sweep."""

    number: int
    folder: str  # within the sweep's
    overrides: list[str]  # in Hydra's grammar, without those of Hydra itself
    status: str = "waiting"  # running, finished, out_of_memory, not_finite, stopped, failed, timed_out, killed, interrupted
    error: str | None = None
    exit_code: int | None = None  # negative: the signal that ended it
    seconds: float | None = None
    gpus: list[int | str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether its result counts as one, so that it need not run again."""
        return self.status in GOOD


class Sweep:
    """The folder of a sweep and its points."""

    def __init__(self, folder: Path, command: list[str], overrides: list[str]) -> None:
        self.folder = folder
        self.command = command
        self.overrides = overrides
        self.started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S%z")
        self.points: list[Point] = []
        self.lock = FileLock(folder / LOCK)

    @classmethod
    def open(cls, folder: Path, command: list[str], overrides: list[str], go_on: bool) -> Sweep:
        """Begins a sweep in `folder`, or with `go_on` takes up the one that is there. The folder is this process's until it ends.

        Raises UserError where a sweep is there and should not be, the other way round, or another process is at it.
        """
        sweep = cls(folder, command, overrides)
        try:
            sweep.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"sweep={folder} is still at work in another process; end that one first") from None
        if (folder / RECORD).exists():
            if not go_on:
                raise UserError(
                    f"{folder} holds a sweep; {argument('sweep', folder)} goes on with it, or name another hydra.sweep.dir"
                )
            saved: Any = read_json(folder / RECORD)
            try:
                sweep.command, sweep.overrides, sweep.started = saved["command"], saved["overrides"], saved["started"]
                sweep.points = [Point(**point) for point in saved["points"]]
            except (KeyError, TypeError) as error:
                raise UserError(f"{folder / RECORD} was not written by train.py -m ({error}); start another sweep") from None
            for point in sweep.points:  # a point's folder is emptied before it starts
                sweep.refuse_outside(point.folder)
        return sweep

    def place(self, number: int, overrides: list[str], folder: str) -> Point:
        """The point of that number: as saved, or a new one in `folder` (within the sweep's).

        Where an earlier point has that folder, the new one's name gets its number. Raises UserError for a saved point with other
        values, and for a folder that is not strictly inside the sweep's.
        """
        saved = [point for point in self.points if point.number == number]
        if saved:
            if saved[0].overrides != overrides:
                raise UserError(
                    f"point {number} of sweep={self.folder} was {' '.join(saved[0].overrides)}, and its sweeper now asks for "
                    f"{' '.join(overrides)}; start another sweep"
                )
            return saved[0]
        if any(point.folder == folder for point in self.points):
            folder = f"{folder}_{number}"
        self.refuse_outside(folder, others=[point.folder for point in self.points])
        self.points.append(Point(number, folder, overrides))
        return self.points[-1]

    def refuse_outside(self, folder: str, others: Sequence[str] = ()) -> None:
        """Raises UserError where a point's folder does not lie inside the sweep's, or not beside the `others`."""
        here, inside = self.folder.resolve(), (self.folder / folder).resolve()
        taken = [(self.folder / other).resolve() for other in others]
        if here not in inside.parents or any(inside in [other, *other.parents] or other in inside.parents for other in taken):
            raise UserError(
                f"hydra.sweep.subdir: {folder} is no folder of its own inside {self.folder}; "
                f"${{hydra.job.num}} gives every point one"
            )

    def folder_of(self, point: Point) -> Path:
        return self.folder / point.folder

    def make_ready(self, point: Point) -> bool:
        """Makes the folder of a point that is about to start; returns whether it goes on from the checkpoint that lies there.

        That is so where it was ended from outside: a resumed run is the run that was not stopped. Else it starts anew, in an
        empty folder.
        """
        folder = self.folder_of(point)
        files = (folder / "checkpoints" / "last.ckpt", folder / ".hydra" / "overrides.yaml")
        goes_on = point.status in ENDED_FROM_OUTSIDE and all(file.is_file() for file in files)
        if goes_on:
            (folder / "result.json").unlink(missing_ok=True)  # of the earlier start
        else:
            self.empty(point)
        return goes_on

    def empty(self, point: Point) -> None:
        """Makes the folder of a point, or empties it."""
        folder = self.folder_of(point)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        """Writes points.json, all of it or nothing."""
        points = [asdict(point) for point in self.points]
        record = {"command": self.command, "overrides": self.overrides, "started": self.started, "points": points}
        write_json(self.folder / RECORD, record)

    def names(self) -> dict[int, str]:
        """What sets each point apart, by number."""
        apart = differing([point.overrides for point in self.points])
        return {point.number: name for point, name in zip(self.points, apart, strict=True)}
