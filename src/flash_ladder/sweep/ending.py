"""The end of a sweep: how many points came to what, which ones failed and why, and the exit code."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from flash_ladder.errors import UserError, argument
from flash_ladder.files import read_json
from flash_ladder.overrides import differing
from flash_ladder.sweep.points import RECORD, Point
from flash_ladder.sweep.process import CONSOLE
from flash_ladder.sweep.report import report
from flash_ladder.sweep.to_wandb import log_sweep


class EndOfSweep(Callback):
    """Hydra calls it when a sweeper is done; it ends the process with 1 where a point neither finished nor ran out of memory."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        if (folder / RECORD).is_file():  # else another launcher ran the points
            sys.exit(close(folder))


def close(folder: Path) -> int:
    """Writes the report of the sweep in `folder`, prints how it ended, and returns the exit code."""
    points = [Point(**point) for point in read_json(folder / RECORD)["points"]]
    try:
        log_sweep(folder, report(folder))
    except UserError as error:  # the points' own results are there all the same
        print(f"warning: no report: {error}", file=sys.stderr)
    counts = Counter(point.status.replace("_", " ") for point in points)
    bad = [point for point in points if not point.is_good]
    print(f"\nsweep        {folder}: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    names = differing([point.overrides for point in points])
    for point, name in zip(points, names, strict=True):
        if not point.is_good:
            log = folder / point.folder / CONSOLE
            print(f"{point.status.replace('_', ' '):12} {name or point.number}: {point.error or 'no reason known'} ({log})")
    if bad:
        print(f"again        python {shlex.quote(sys.argv[0])} {argument('sweep', folder)}   runs those points again")
    return 1 if bad else 0
