"""What one run's folder says of it: its row in the report.

result.json is read where there is one. Runs of earlier code and killed ones are read from config.yaml, environment.json and
metrics.jsonl. A damaged file costs a warning and its own figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from flash_ladder.files import json_of, plain_yaml
from flash_ladder.names import FINISHED
from flash_ladder.training import metrics

UNFINISHED = "unfinished"  # of a run without a result.json: it was killed, or is still going
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


def in_words(differs: dict[str, str]) -> list[str]:
    """What differs, with the last parts of the keys: "n_head=8". A strategy, a precision and a GPU need no name."""
    return [
        value if key in ("strategy", "precision", "gpu") else f"{key.rpartition('.')[2]}={value}" for key, value in differs.items()
    ]


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
        return clean(" ".join(value.split())) if isinstance(value, str) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return int(value) if kind.startswith("int") else float(value)


def clean(text: str) -> str:
    """`text` without halves of surrogate pairs, which JSON may hold and no file takes."""
    return text.encode("utf-8", "replace").decode()


def log_lines(run: Path, notes: list[str]) -> list[dict]:
    """The lines of metrics.jsonl; the last one may be torn by a kill."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(dict(json_of(line)))
        except (ValueError, TypeError):
            if number < len(lines) - 1:
                tell(notes, f"{run / 'metrics.jsonl'}: line {number + 1} cannot be read")
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


# ---- files ----


def read_object(path: Path, notes: list[str]) -> dict | None:
    """A JSON object; None, with a warning, where the file holds none."""
    try:
        found = json_of(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        reason = "it is no JSON object"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
    tell(notes, f"{path} is left out: {reason}")
    return None


def read_yaml(path: Path, notes: list[str]) -> dict:
    """A YAML mapping; {}, with a warning, where the file holds none."""
    try:
        found = plain_yaml(path)
        if isinstance(found, dict):
            return found
        reason = "it is no configuration"
    except (OSError, ValueError):
        reason = "it is damaged"
    tell(notes, f"{path} is left out: {reason}")
    return {}


def tell(notes: list[str], note: str) -> None:
    """Adds a warning, once however often a file is read."""
    if note not in notes:
        notes.append(note)
