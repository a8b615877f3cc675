"""What a run writes down about itself: metrics.jsonl.

It is the record: one JSON object a line, written and flushed at once, whatever other loggers do.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from flash_ladder.errors import UserError
from flash_ladder.files import json_of
from flash_ladder.training import metrics
from flash_ladder.training.log import warn

METRICS = "metrics.jsonl"


class MetricsFile(Logger):
    """Appends to metrics.jsonl: {"step": optimiser steps taken, "time": Unix seconds, NAME: number, ...}.

    A number that JSON lacks (nan, inf) is written as null. The file is the record, and yet it stops no run: where it was removed
    while a run trains, or its folder was, it is written anew with all its rows, and rows that the disk does not take wait for the
    next one. `trouble` says what became of it.

    restore: writes what else stood in the folder.
    """

    def __init__(self, path: Path, restore: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.path, self.restore = path, restore
        self.file = path.open("a+b", buffering=0)
        self.unwritten = b""
        self.step: int | None = None  # of the last row
        self.trouble: str | None = None  # one line
        self.told = False  # that the disk takes no rows
        self.latest: dict[str, float] = {}  # the last value of every metric
        for row in read_metrics(path):
            self.latest |= {name: value for name, value in row.items() if "/" in name and value is not None}

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        line = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.unwritten += json.dumps({"step": step, "time": round(time.time(), 3), **line}).encode() + b"\n"
        self.latest |= metrics
        self.step = step
        self._write()

    def _write(self) -> None:
        try:
            if self._is_gone():
                self._begin_anew()
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if not self.told:
                warn(f"{self.path} cannot be written ({error.strerror}); its rows from step {self.step} on wait in memory")
            self.told = True

    def _is_gone(self) -> bool:
        """Whether no file has the name of the one that is open, or another one."""
        try:
            return not os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            return True

    def _begin_anew(self) -> None:
        """Writes the rows of the removed file to a new one: a file keeps its bytes for as long as it is open."""
        self.file.seek(0)
        rows = self.file.read()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.open("w+b", buffering=0)
        self.file.close()
        self.file, self.unwritten = new, rows + self.unwritten
        self.trouble = f"{self.path} was removed while the run trained (seen at step {self.step}) and written anew"
        warn(self.trouble)
        self.restore()

    def close(self, *, failed: bool = False) -> None:
        """Closes the file; a second call does nothing."""
        if self.file.closed:
            return
        self._write()
        self.file.close()
        if self.trouble is not None:
            with suppress(OSError):
                self.restore()  # the folder was perhaps still being removed at that time
        if self.unwritten:
            n_rows = self.unwritten.count(b"\n")
            self.trouble = f"{self.path} lacks the last {n_rows} rows: it could not be written"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, less one that a killed run was writing; none where there is no file.

    Damaged lines are left out, with one warning. Raises UserError where the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); take it out of the way") from None
    rows = [_row(line) for line in lines if line.strip()]
    if damaged := rows.count(None):
        warn(f"{path}: {damaged} of {len(lines)} lines are damaged and left out")
    return [row for row in (*rows, _row(last)) if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    """A line of a metrics.jsonl: its step, and numbers by name; None where it is something else."""
    try:
        row = json_of(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return row if all(value is None or isinstance(value, (int, float)) for value in row.values()) else None


def rows_until(path: Path, step: int) -> str:
    """The text of a metrics.jsonl without what a run did after its checkpoint of `step`, which the resumed run does again.

    That is later steps, and the figures of an attention layer, which are measured before the first step.
    """
    rows = [row for row in read_metrics(path) if row["step"] < step or (row["step"] == step and metrics.ATTENTION_GIB not in row)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def best_validation(lines: list[dict[str, Any]]) -> tuple[float, int] | None:
    """The lowest val/loss among the lines of a metrics.jsonl, and its step; None before a validation."""
    found = [(line[metrics.VAL_LOSS], line["step"]) for line in lines if line.get(metrics.VAL_LOSS) is not None]
    return min(found, default=None)
