"""What a run writes down about itself: metrics.jsonl, and wandb's copy.

metrics.jsonl is the record: one JSON object a line, written and flushed at once, whatever wandb does. wandb holds a copy to
look at. A server that is down costs no more than a bounded wait at the start (INIT_TIMEOUT) and at the end (FINISH_TIMEOUT).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from flash_ladder.schema import LoggerConfig

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT = 20  # seconds that wandb may take to reach its server before the run goes on offline
FINISH_TIMEOUT = 30  # seconds that it may take at the end to send what is left


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


class WandbCopy(WandbLogger):
    """Lightning's wandb logger on a run that is already open. If wandb fails later, training goes on without it."""

    def __init__(self, run: wandb.Run) -> None:
        super().__init__(experiment=run)
        self.run = run
        self.failed = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        import wandb

        if self.failed:
            return
        try:
            super().log_metrics(metrics, step)
        except (wandb.Error, OSError) as error:
            self.failed = True
            warn(f"wandb stopped working ({_one_line(error)}); metrics.jsonl goes on")

    def close(self, *, failed: bool = False) -> None:
        """Sends what is left, within FINISH_TIMEOUT seconds."""
        self.run.finish(exit_code=int(failed))


def open_wandb(cfg: LoggerConfig, run_dir: Path, config: dict[str, Any]) -> wandb.Run | None:
    """Starts wandb as `cfg.mode` says, in `run_dir`/wandb; None for mode=disabled. `config`: the run's, as plain data.

    A resumed run goes on under the same wandb id. Where the server cannot be reached, the run is kept offline for
    `wandb sync` to upload. Where wandb cannot start at all, the result is None. Either case gives one warning.
    """
    if cfg.mode == "disabled":
        return None
    import wandb  # takes a second, which a run without wandb need not spend

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=INIT_TIMEOUT, login_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT
    )
    wandb.setup(settings)
    id_file = run_dir / "wandb" / "id"
    about: dict[str, Any] = {
        "project": cfg.project,
        "name": cfg.name,
        "dir": run_dir,
        "config": config,
        "id": id_file.read_text() if id_file.exists() else None,
        "resume": "allow",
        "settings": settings,
    }
    failures = []
    for mode in ("online", "offline") if cfg.mode == "online" else ("offline",):
        try:
            run = wandb.init(mode=mode, **about)
            id_file.write_text(run.id)
        except (wandb.Error, OSError) as error:
            failures.append(_one_line(error))
            continue
        if failures:
            warn(f"wandb is offline ({failures[0]}); `wandb sync {run_dir}/wandb/offline-run-*` uploads the run later")
        return run
    warn(f"wandb could not start ({failures[-1]}); metrics.jsonl has everything")
    return None


def warn(text: str) -> None:
    """One line on the screen, without the source line that Python's warnings add."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
