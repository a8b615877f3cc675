"""What the runs below a folder came to: one row a run, or a point of a sweep that left no run.

sweep/run_files.py reads each run. A sweep's points.json adds the points that left no folder and how each point ended. A damaged or
foreign file costs a warning and its own figures, never the report.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flash_ladder.errors import UserError
from flash_ladder.files import plain_yaml
from flash_ladder.names import BACKENDS
from flash_ladder.sweep.run_files import Row, clean, fill, read_object, read_run, read_yaml

# Keys of the configuration that a row has fields of its own for, or that do not change what is measured.
OWN_KEYS = (
    *("attention", "attention.backend", "data.seq_len", "data.batch_size", "trainer.accumulate", "trainer.devices"),
    *("trainer", "trainer.num_nodes", "trainer.strategy", "resume", "model.max_seq_len", "model.vocab_size"),
)
ASIDE = ("hydra", "logger", "sweep", "data.cache_dir")  # these and all keys below them


@dataclass(frozen=True)
class Sweep:
    """The runs below a folder, sorted, and where they were measured."""

    folder: Path
    rows: list[Row]
    baseline: str | None  # the backend that speed-ups are over; None where neither eager nor sdpa was measured
    commands: list[str]
    machines: list[str]  # GPUs, or CPU
    versions: list[str]
    dates: list[str]
    warnings: list[str]

    @property
    def keys(self) -> list[str]:
        """The keys that vary between the runs and have no field of their own."""
        return list(dict.fromkeys(key for row in self.rows for key in row.differs))


# ---- a folder ----


def read_sweep(folder: Path, baseline: str | None = None) -> Sweep:
    """Reads every run below `folder`. `baseline`: the backend that speed-ups are over; None: eager, or sdpa where eager has none.

    Raises UserError where there is no run, or none of the baseline.
    """
    if not folder.is_dir():
        raise UserError(f"runs={folder} is not a folder; name one that train.py wrote, outputs/DATE/TIME, or outputs for all")
    notes: list[str] = []
    found: dict[Path, Row] = {}
    settings: dict[Path, dict[str, str] | None] = {}  # the overrides of each, where they are known
    commands, environments = [], []
    for root, names in walk(folder):
        if "points.json" in names and (points := read_object(root / "points.json", notes)):
            commands += [command_line(points.get("command"))]
            for path, row, overrides in read_points(points, root, notes):
                found[path], settings[path] = row, overrides
        if is_run(root, names, notes):
            found[root] = read_run(root, notes, found.get(root))
            environments.append((read_object(root / "environment.json", notes) if "environment.json" in names else None) or {})
            settings[root] = settings.get(root) or read_overrides(root)
    if not found:
        raise UserError(
            f"runs={folder} holds no run (a folder with config.yaml and metrics.jsonl, or result.json); name a folder that "
            "train.py wrote, or one above it"
        )
    rows = [replace(row, folder=os.path.relpath(path, folder)) for path, row in found.items()]
    rows = [replace(row, differs=differs) for row, differs in zip(rows, varying(found, settings, notes), strict=True)]
    baseline = pick_baseline(rows, baseline)
    return Sweep(
        folder,
        sorted(with_speedups(rows, baseline), key=order),
        baseline,
        list(dict.fromkeys(c for c in commands or map(command_line, (e.get("command") for e in environments)) if c)),
        list(dict.fromkeys(str(e.get("gpu") or "CPU") for e in environments if e)),
        list(dict.fromkeys(versions(e) for e in environments if e.get("versions"))),
        sorted({str(e["started"])[:10] for e in environments if e.get("started")}),
        notes,
    )


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders and the files in them, from above; what lies inside a run (checkpoints, wandb, exports) is not looked at."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if {"config.yaml", "metrics.jsonl"} <= {*names} or ".hydra" in os.listdir(root):
            folders[:] = [f for f in folders if f not in ("checkpoints", "wandb", "export")]
        yield Path(root), names


def is_run(folder: Path, names: list[str], notes: list[str]) -> bool:
    """Whether `folder` holds a run. A result.json of another command gets a warning."""
    if {"config.yaml", "metrics.jsonl"} <= {*names}:
        return True
    if "result.json" not in names or (found := read_object(folder / "result.json", notes)) is None:
        return False
    if "status" not in found or not isinstance(found.get("setting"), dict):
        notes.append(f"{folder / 'result.json'} is not a run's; it is left out")
        return False
    return True


def order(row: Row) -> tuple:
    """Backends as the ladder has them, then lengths, then the rest."""
    ladder = list(BACKENDS)
    place = ladder.index(row.backend) if row.backend in ladder else len(ladder)
    numbers = (row.seq_len, row.n_devices, row.batch_size)
    return place, row.backend or "", [math.inf if n is None else n for n in numbers], row.strategy or "", natural(row)


def natural(row: Row) -> list[tuple]:
    """Values that differ, numbers by size; then the folder, "10" after "9"."""
    return [(0, number, "") if (number := as_number(v)) is not None else (1, 0.0, v) for v in (*row.differs.values(), row.folder)]


# ---- points and overrides ----


def read_points(found: dict, root: Path, notes: list[str]) -> Iterator[tuple[Path, Row, dict[str, str]]]:
    """Each point of a points.json: its folder, its row as far as the overrides tell, and the overrides."""
    points = found.get("points")
    for point in points if isinstance(points, list) else ():
        if not isinstance(point, dict) or not isinstance(point.get("folder"), str):
            notes.append(f"{root / 'points.json'} has a point without a folder; it is left out")
            continue
        overrides = split_overrides(point.get("overrides"))
        row = Row(point["folder"], has_run=False)
        row = fill(row, {"backend": overrides.get("attention", overrides.get("attention.backend"))})
        asked = {"seq_len": "data.seq_len", "batch_size": "data.batch_size", "n_devices": "trainer.devices"}
        row = fill(row, {name: as_number(overrides.get(key)) for name, key in asked.items()})
        row = fill(row, {"strategy": overrides.get("trainer.strategy", overrides.get("trainer"))})
        row = fill(row, {key: point.get(key) for key in ("status", "error", "seconds")})
        yield root / point["folder"], row, overrides


def read_overrides(run: Path) -> dict[str, str] | None:
    """What the command line of a run said, from Hydra's notes; None where there are none."""
    try:
        return split_overrides(plain_yaml(run / ".hydra" / "overrides.yaml"))
    except (OSError, ValueError):
        return None


def split_overrides(overrides: Any) -> dict[str, str]:
    """["data.seq_len=512", ...] by key."""
    found = (o.lstrip("+~").partition("=") for o in overrides if isinstance(o, str)) if isinstance(overrides, list) else ()
    return {clean(key): clean(value) for key, _, value in found}


def varying(rows: dict[Path, Row], settings: dict[Path, dict[str, str] | None], notes: list[str]) -> list[dict[str, str]]:
    """What differs between the runs, for each of them: overrides where all runs have theirs, else values of config.yaml."""
    known = [settings[path] for path in rows]
    values = [s or {} for s in known]
    if any(s is None for s in known):
        values = [leaves(read_yaml(path / "config.yaml", notes)) if (path / "config.yaml").exists() else {} for path in rows]
    keys = [k for k in dict.fromkeys(k for v in values for k in v) if k not in OWN_KEYS and not any(is_under(k, a) for a in ASIDE)]
    different = [key for key in keys if len({v.get(key) for v in values}) > 1]
    return [{key: v[key] for key in different if key in v} for v in values]


def is_under(key: str, group: str) -> bool:
    """Whether a dotted key is `group` or lies below it ("hydra.run.dir", "hydra/launcher")."""
    return key == group or key.startswith((f"{group}.", f"{group}/"))


def leaves(tree: dict, prefix: str = "") -> dict[str, str]:
    """The values of a nested dict by dotted key, as text."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return found


# ---- speed over a baseline ----


def pick_baseline(rows: list[Row], asked: str | None) -> str | None:
    """The backend that speed-ups are over. Raises UserError where the one asked for has no run with a speed."""
    measured = {row.backend for row in rows if row.tokens_per_second}
    if asked is not None and asked not in measured:
        there = ", ".join(name for name in BACKENDS if name in measured) or "none"
        raise UserError(f"baseline={asked} has no run whose speed was measured here; these have: {there}")
    return asked or next((name for name in ("eager", "sdpa") if name in measured), None)


def other_settings(row: Row) -> tuple:
    """All that two runs must have in common for their speeds to be compared: everything but the backend."""
    shape = (row.seq_len, row.batch_size, row.accumulate, row.n_devices, row.n_nodes, row.strategy, row.precision, row.compile)
    return *shape, row.gpu, *sorted(row.differs.items())


def with_speedups(rows: list[Row], baseline: str | None) -> list[Row]:
    """`rows` with the speed of each over the baseline's."""
    speeds = {other_settings(row): row.tokens_per_second for row in rows if row.backend == baseline and row.tokens_per_second}
    found = []
    for row in rows:
        base = speeds.get(other_settings(row))
        found.append(replace(row, speedup=row.tokens_per_second / base) if base and row.tokens_per_second else row)
    return found


# ---- words ----


def as_number(text: str | None) -> float | None:
    """A number in a command line; None where it is none."""
    try:
        number = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def command_line(arguments: Any) -> str:
    """A command as one line."""
    return clean(" ".join(map(str, arguments))) if isinstance(arguments, list) else ""


def versions(environment: dict) -> str:
    """ "torch 2.13.0, triton 3.6.0, ..." of an environment.json."""
    found: Any = environment["versions"]
    names: Iterable[str] = ("flash-ladder", "torch", "triton", "cuda", "lightning", "python")
    return ", ".join(f"{n} {found[n]}" for n in names if found.get(n)) if isinstance(found, dict) else ""
