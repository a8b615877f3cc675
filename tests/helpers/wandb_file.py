"""Reads wandb's own offline file, run-*.wandb: records of wandb's protocol in the blocks of a LevelDB log."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32768
HEADER = struct.Struct("<IHB")  # checksum, length, and kind of a chunk: 1 whole, 2 first, 3 middle, 4 last


def records(path: Path) -> Iterator[Any]:
    """The records of a file, in order."""
    data = path.read_bytes()
    assert data.startswith(b":W&B")
    at, record = 7, b""
    while at + HEADER.size <= len(data):
        if (left := BLOCK - at % BLOCK) < HEADER.size:
            at += left
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        at += HEADER.size + length
        record += data[at - length : at]
        if kind in (1, 4):
            parsed = wandb_internal_pb2.Record()
            parsed.ParseFromString(record)
            yield parsed
            record = b""


def segments(run_dir: Path) -> list[Path]:
    """The files of a run, one for each time that it was opened, oldest first."""
    return sorted(run_dir.glob("wandb/*run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)


class WandbFile:
    """What the file says of its run."""

    def __init__(self, path: Path) -> None:
        self.run: Any = None
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []  # of the history
        self.metrics: list[Any] = []  # definitions
        self.exit_code: int | None = None
        self.folder = path.parent
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "summary":
                _put(self.summary, record.summary.update)
            elif kind == "history":
                self.rows.append({})
                _put(self.rows[-1], record.history.item)
            elif kind == "metric":
                self.metrics.append(record.metric)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code

    def values(self, name: str) -> list[tuple[int, float]]:
        """A metric over the optimiser step."""
        return [(row["trainer/global_step"], row[name]) for row in self.rows if name in row]

    def table(self, name: str) -> list[dict[str, Any]]:
        """The rows of the table that was logged last under a name."""
        found = json.loads((self.folder / "files" / self.summary[name]["path"]).read_text())
        return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]


def _put(target: dict[str, Any], items: Any) -> None:
    for item in items:
        *outer, last = item.nested_key or [item.key]
        node = target
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = json.loads(item.value_json)
