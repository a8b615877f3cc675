"""What the runs below a folder came to: one row a run, or a point of a sweep that left no run.

A run's result.json is read where there is one. Runs of earlier code and killed ones are read from config.yaml, environment.json
and metrics.jsonl. A sweep's points.json adds the points that left no folder and how each point ended. A damaged or foreign file
costs a warning and its own figures, never the report.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from flash_ladder.errors import UserError
from flash_ladder.names import BACKENDS
from flash_ladder.training import metrics

FINISHED, OUT_OF_MEMORY = "finished", "out_of_memory"
UNFINISHED = "unfinished"  # of a run without a result.json: it was killed, or is still going
# Keys of the configuration that a row has fields of its own for, or that do not change what is measured.
OWN_KEYS = ("attention", "attention.backend", "data.seq_len", "data.batch_size", "trainer.accumulate", "trainer.devices")
OWN_KEYS += ("trainer", "trainer.num_nodes", "trainer.strategy", "resume", "model.max_seq_len", "model.vocab_size")
ASIDE = ("hydra", "logger", "sweep", "data.cache_dir")  # these and all keys below them
# Metrics of a run in a row, by the row's field.
MEASURED = {
    "tokens_per_second": metrics.TOKENS_PER_SECOND,
    "mfu": metrics.MFU,
    "mfu_causal": metrics.MFU_CAUSAL,
    "peak_gib": metrics.PEAK_GIB,
    "attention_gib": metrics.ATTENTION_GIB,
    "attention_seconds": metrics.ATTENTION_SECONDS,
    "eager_gib": metrics.ATTENTION_EAGER_GIB,
    "saved_gib": metrics.ATTENTION_SAVED_GIB,
    "saved_ratio": metrics.ATTENTION_SAVED_RATIO,
    "attention_speedup": metrics.ATTENTION_SPEEDUP,
    "joules_per_token": metrics.JOULES_PER_TOKEN,
    "val_loss": metrics.VAL_LOSS,
    "train_loss": metrics.TRAIN_LOSS,
}


@dataclass(frozen=True)
class Row:
    """One run. What was not measured, or is not known, is None."""

    folder: str  # relative to the folder that the report is of
    differs: dict[str, str] = field(default_factory=dict)  # keys that vary between the runs, those with a field here left out
    backend: str | None = None
    seq_len: int | None = None
    batch_size: int | None = None  # sequences a device sees at once
    accumulate: int | None = None  # batches of an optimiser step
    n_devices: int | None = None  # all of them together
    n_nodes: int | None = None
    strategy: str | None = None
    precision: str | None = None
    compile: bool | None = None
    n_params: int | None = None
    gpu: str | None = None
    tokens_per_second: float | None = None  # all devices together
    mfu: float | None = None  # share of the devices' dense peak, full attention counted
    mfu_causal: float | None = None
    peak_gib: float | None = None  # of a device: tensors of a GPU, or on a CPU the process's resident set
    attention_gib: float | None = None  # one layer, a whole batch, forward and backward
    attention_seconds: float | None = None  # the same layer
    eager_gib: float | None = None  # what eager attention takes for that layer, or at least takes
    saved_gib: float | None = None
    saved_ratio: float | None = None
    attention_speedup: float | None = None  # of that layer over eager's, measured in the same run
    speedup: float | None = None  # tokens/s over the baseline's run of the same other settings
    joules_per_token: float | None = None
    val_loss: float | None = None
    train_loss: float | None = None
    step: int | None = None
    status: str = UNFINISHED
    error: str | None = None
    seconds: float | None = None  # of the whole run
    has_run: bool = True  # whether the folder holds a run's files

    @property
    def name(self) -> str:
        """The run in a few words: "flash_v2, 4096, n_head=8"."""
        words = [self.backend or "?", *([str(self.seq_len)] if self.seq_len else []), *in_words(self.differs)]
        return ", ".join(words)


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


def in_words(differs: dict[str, str]) -> list[str]:
    """What differs, with the last parts of the keys: "n_head=8". A strategy, a precision and a GPU need no name."""
    return [
        value if key in ("strategy", "precision", "gpu") else f"{key.rpartition('.')[2]}={value}" for key, value in differs.items()
    ]


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


# ---- one run ----


def read_run(run: Path, notes: list[str], point: Row | None) -> Row:
    """A run's row; `point`: what points.json says of it, whose status counts for more, as it is of the whole process."""
    row = read_config(run, notes)
    result = (read_object(run / "result.json", notes) or {}) if (run / "result.json").exists() else {}
    setting = result.get("setting")
    if isinstance(setting, dict):
        row = fill(row, setting)
    measured = result.get("metrics")
    if not isinstance(measured, dict):
        measured = latest(run, notes)
    row = fill(row, {name: measured.get(metric) for name, metric in MEASURED.items()})
    row = fill(row, {key: result.get(key) for key in ("step", "status", "error", "seconds")})
    if "status" not in result and row.step is None:
        row = replace(row, **from_log(run, notes))
    if point is None:
        return row
    status = row.status if point.status in ("waiting", "running") and "status" in result else point.status
    return replace(row, status=status, error=row.error or point.error, seconds=point.seconds or row.seconds)


def read_config(run: Path, notes: list[str]) -> Row:
    """What config.yaml and environment.json say of a run."""
    config = read_yaml(run / "config.yaml", notes) if (run / "config.yaml").exists() else {}
    about = (read_object(run / "environment.json", notes) or {}) if (run / "environment.json").exists() else {}
    data, trainer = (part if isinstance(part := config.get(name), dict) else {} for name in ("data", "trainer"))
    chosen = {name: part if isinstance(part := about.get(name), dict) else {} for name in ("attention", "precision")}
    asked = config.get("attention")
    row = fill(Row(str(run)), {key: data.get(key) for key in ("seq_len", "batch_size")})
    row = fill(row, {key: trainer.get(key) for key in ("accumulate", "strategy", "precision", "compile")})
    row = fill(row, {"backend": asked.get("backend") if isinstance(asked, dict) else None, "n_devices": trainer.get("devices")})
    row = fill(row, {"gpu": about.get("gpu"), "n_devices": about.get("n_devices")})
    return fill(row, {"backend": chosen["attention"].get("backend"), "precision": chosen["precision"].get("precision")})


def fill(row: Row, values: dict[str, Any]) -> Row:
    """`row` with those values that it has fields for and that are of the right kind."""
    right = {f.name: converted(values[f.name], str(f.type)) for f in fields(Row) if f.name in values}
    return replace(row, **{name: value for name, value in right.items() if value is not None})


def converted(value: Any, kind: str) -> Any:
    """`value` where it is a `kind` ("int | None"), a finite number where one is wanted; else None."""
    if kind.startswith("bool"):
        return value if isinstance(value, bool) else None
    if kind.startswith("str"):
        return " ".join(value.split()) if isinstance(value, str) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return int(value) if kind.startswith("int") else float(value)


def log_lines(run: Path, notes: list[str]) -> list[dict]:
    """The lines of metrics.jsonl; the last one may be torn by a kill."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if number < len(lines) - 1:
                notes.append(f"{run / 'metrics.jsonl'}: line {number + 1} and what follows cannot be read")
                break
    return found


def latest(run: Path, notes: list[str]) -> dict[str, Any]:
    """The last value of each metric that metrics.jsonl has."""
    values: dict[str, Any] = {}
    for line in log_lines(run, notes):
        values |= {name: value for name, value in line.items() if value is not None}
    return values


def from_log(run: Path, notes: list[str]) -> dict[str, Any]:
    """Steps and status of a run that left no result: finished where it validated on its last step."""
    lines = log_lines(run, [])
    steps = [line["step"] for line in lines if isinstance(line.get("step"), int)]
    if not steps:
        return {}
    config = read_yaml(run / "config.yaml", notes)
    wanted = config["trainer"].get("max_steps") if isinstance(config.get("trainer"), dict) else None
    done = any(line.get("step") == wanted and metrics.VAL_LOSS in line for line in lines)
    times = [line["time"] for line in lines if isinstance(line.get("time"), (int, float))]
    return {
        "step": max(steps),
        "status": FINISHED if done else UNFINISHED,
        "seconds": round(times[-1] - times[0], 3) if len(times) > 1 else None,
    }


def curve(run: Path, metric: str) -> dict[int, float]:
    """One metric of a run by optimiser step, from metrics.jsonl."""
    return {
        line["step"]: float(line[metric])
        for line in log_lines(run, [])
        if isinstance(line.get("step"), int) and converted(line.get(metric), "float") is not None
    }


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
        return split_overrides(as_plain(run / ".hydra" / "overrides.yaml"))
    except (OSError, ValueError):
        return None


def split_overrides(overrides: Any) -> dict[str, str]:
    """["data.seq_len=512", ...] by key."""
    found = (o.lstrip("+~").partition("=") for o in overrides if isinstance(o, str)) if isinstance(overrides, list) else ()
    return {key: value for key, _, value in found}


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
    found = {}
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


# ---- files ----


def read_object(path: Path, notes: list[str]) -> dict | None:
    """A JSON object; None, with a warning, where the file holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        reason = "it is no JSON object"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
    notes.append(f"{path} is left out: {reason}")
    return None


def read_yaml(path: Path, notes: list[str]) -> dict:
    """A YAML mapping; {}, with a warning, where the file holds none."""
    try:
        found = as_plain(path)
        if isinstance(found, dict):
            return found
        reason = "it is no configuration"
    except (OSError, ValueError):
        reason = "it is damaged"
    if (note := f"{path} is left out: {reason}") not in notes:
        notes.append(note)
    return {}


def as_plain(path: Path) -> Any:
    """A YAML file as dicts and lists. Raises OSError or ValueError."""
    from yaml import YAMLError, safe_load  # Hydra's

    try:
        return safe_load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise ValueError(str(error)) from None


def as_number(text: str | None) -> float | None:
    """A number in a command line; None where it is none."""
    try:
        number = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def command_line(arguments: Any) -> str:
    """A command as one line."""
    return " ".join(map(str, arguments)) if isinstance(arguments, list) else ""


def versions(environment: dict) -> str:
    """ "torch 2.13.0, triton 3.6.0, ..." of an environment.json."""
    found: Any = environment["versions"]
    names: Iterable[str] = ("flash-ladder", "torch", "triton", "cuda", "lightning", "python")
    return ", ".join(f"{n} {found[n]}" for n in names if found.get(n)) if isinstance(found, dict) else ""
