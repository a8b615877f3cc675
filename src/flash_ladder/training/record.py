"""What a run writes down about itself: metrics.jsonl.

It is the record: one JSON object a line, written and flushed at once, whatever other loggers do.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from flash_ladder.training import metrics


class MetricsFile(Logger):
    """Appends to metrics.jsonl: {"step": optimiser steps taken, "time": Unix seconds, NAME: number, ...}.

    A number that JSON lacks (nan, inf) is written as null. A line torn by an earlier kill is dropped.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        written = path.read_bytes() if path.exists() else b""
        if written and not written.endswith(b"\n"):
            os.truncate(path, written.rfind(b"\n") + 1)
        self.file = path.open("a", encoding="utf-8")
        self.latest: dict[str, float] = {}  # the last value of every metric

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
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **line}) + "\n")
        self.file.flush()
        self.latest |= metrics

    def close(self, *, failed: bool = False) -> None:
        """Closes the file."""
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, less one that a killed run was writing; none where there is no file."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def best_validation(lines: list[dict[str, Any]]) -> tuple[float, int] | None:
    """The lowest val/loss among the lines of a metrics.jsonl, and its step; None before a validation."""
    found = [(line[metrics.VAL_LOSS], line["step"]) for line in lines if line.get(metrics.VAL_LOSS) is not None]
    return min(found, default=None)
