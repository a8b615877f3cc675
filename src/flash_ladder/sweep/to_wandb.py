"""A sweep's report in wandb: one run beside its points, in their group, with the table and the pictures."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from flash_ladder.files import read_json
from flash_ladder.schema import LoggerConfig


def log_sweep(folder: Path, files: list[Path]) -> None:
    """Logs sweep.csv as a table and every PNG among `files` as a picture, in a run of job_type "report"; a line says where.

    The run goes where the points' runs went, in their mode, unless WANDB_MODE says another. A second report goes on in the same
    run. Nothing is logged for points without wandb or of several groups, which are no sweep.
    """
    points = [read_json(file) for file in sorted(folder.glob("*/wandb/run.json"))]
    groups = {point["group"] for point in points}
    if len(groups) != 1 or None in groups:
        return
    group = groups.pop()
    logger = LoggerConfig(
        mode=None if "WANDB_MODE" in os.environ else points[0]["mode"],
        project=points[0]["project"],
        entity=points[0]["entity"],
        group=group,
        name=f"report {group}",
        job_type="report",
    )
    from flash_ladder.training.wandb_copy import open_wandb  # Lightning and torch, which a sweep's process does without

    copy = open_wandb(logger, folder, {"points": len(points)})
    if copy is None:
        return
    columns, rows = read_table(folder / "sweep.csv")
    copy.log_report(columns, rows, {file.stem.removeprefix("sweep_"): file for file in files if file.suffix == ".png"})
    print(f"wandb: {copy.how_to_look()}")
    copy.close()


def read_table(path: Path) -> tuple[list[Any], list[list[Any]]]:
    """A CSV file's column names and rows: an empty cell is None, and a column of numbers alone holds numbers."""
    with path.open(newline="", encoding="utf-8") as file:
        columns, *rows = csv.reader(file)
    parsed = [_column([row[i] for row in rows]) for i in range(len(columns))]
    return columns, [list(row) for row in zip(*parsed, strict=True)]


def _column(cells: list[str]) -> list[Any]:
    try:
        return [float(cell) if cell else None for cell in cells]
    except ValueError:
        return [cell or None for cell in cells]
