"""The table of a sweep: its columns, on the screen as wide as the terminal, and as CSV and JSON with everything."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flash_ladder.files import write_json
from flash_ladder.names import FINISHED
from flash_ladder.sweep.rows import Sweep
from flash_ladder.sweep.run_files import Row
from flash_ladder.sweep.series import Picture
from flash_ladder.units import GIB, size

GAP = "  "


@dataclass(frozen=True)
class Column:
    """A column of the table; `worth`: those of least worth go first where the screen is narrow."""

    head: str
    what: str  # in a line, for the page
    value: Callable[[Row], Any]  # None: not known
    text: Callable[[Any], str]
    worth: int
    is_number: bool = True


def gib(value: float) -> str:
    """Memory in words."""
    return size(value * GIB)


def duration(value: float) -> str:
    """Seconds in words, to three digits."""
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def times(value: float) -> str:
    """A ratio, to three digits where it is small."""
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def columns(sweep: Sweep) -> list[Column]:
    """The columns that a row has something for, in their order."""
    base = sweep.baseline or "eager"
    found = [
        Column("backend", "which attention ran", lambda r: r.backend, str, 100, is_number=False),
        Column("seq_len", "tokens of a sequence", lambda r: r.seq_len, lambda n: f"{n:,}", 99),
        *(
            Column(key.rpartition(".")[2], f"{key}, which varies", _differing(key), str, 90 - i, is_number=False)
            for i, key in enumerate(sweep.keys[:6])
        ),
        Column("batch", "sequences of a batch on one device, times batches a step", batch, str, 50),
        Column("GPUs" if "CPU" not in sweep.machines else "devices", "all of them together", lambda r: r.n_devices, str, 48),
        Column("nodes", "machines", lambda r: r.n_nodes if r.n_nodes != 1 else None, str, 20),
        Column("strategy", "how a run is spread over devices", spread, str, 46, is_number=False),
        Column("tokens/s", "of all devices together", lambda r: r.tokens_per_second, lambda n: f"{n:,.0f}", 95),
        Column(f"x {base}", f"tokens/s over those of {base} with the same other settings", lambda r: r.speedup, times, 80),
        Column("MFU", "share of the dense peak, full attention counted", lambda r: r.mfu, lambda n: f"{100 * n:.1f} %", 75),
        Column("peak", "memory of a device: a GPU's tensors, or a CPU's process", lambda r: r.peak_gib, gib, 94),
        Column("layer", "memory of one attention layer, the whole batch", lambda r: r.attention_gib, gib, 70),
        Column("time", "of that layer, forward and backward", lambda r: r.attention_seconds, duration, 40),
        Column("saved", "memory of that layer less than eager's", _beside_eager("saved_gib"), gib, 60),
        Column("x less", "eager's memory of that layer over its own", _beside_eager("saved_ratio"), times, 72),
        Column("x faster", "eager's time of that layer over its own", _beside_eager("attention_speedup"), times, 65),
        Column("mJ/token", "energy, all devices", lambda r: r.joules_per_token, lambda j: f"{1e3 * j:.3g}", 45),
        Column("val loss", "nats per token", lambda r: r.val_loss, lambda x: f"{x:.4f}", 85),
        Column("seconds", "of the whole run", lambda r: r.seconds, lambda s: f"{s:,.0f}", 30),
        Column("status", "how the run ended", lambda r: r.status.replace("_", " "), str, 98, is_number=False),
        Column("folder", "of the run", lambda r: r.folder, str, 25, is_number=False),
    ]
    return [column for column in found if any(column.value(row) is not None for row in sweep.rows)]


def _differing(key: str) -> Callable[[Row], str | None]:
    return lambda row: row.differs.get(key)


def _beside_eager(name: str) -> Callable[[Row], float | None]:
    """A figure beside eager's; eager's own says nothing."""
    return lambda row: None if row.backend == "eager" else getattr(row, name)


def batch(row: Row) -> str | None:
    """ "32 x 8" for 32 sequences and 8 batches a step."""
    if row.batch_size is None:
        return None
    return f"{row.batch_size} x {row.accumulate}" if row.accumulate and row.accumulate != 1 else str(row.batch_size)


def spread(row: Row) -> str | None:
    """How a run is spread over devices; "auto" says nothing."""
    return None if row.strategy == "auto" else row.strategy


def cell(column: Column, row: Row) -> str:
    """A row's text in a column, "-" where it is not known."""
    value = column.value(row)
    return "-" if value is None else column.text(value)


# ---- on the screen ----


def screen_lines(sweep: Sweep, width: int) -> list[str]:
    """The table in at most `width` characters a line, then what was left out for that, and every error in a line."""
    shown = columns(sweep)
    lines = table_lines(sweep.rows, shown)
    left_out = []
    while len(lines[0]) > width and len(shown) > 3:
        least = min(shown, key=lambda column: column.worth)
        shown = [column for column in shown if column is not least]
        left_out.append(least.head)
        lines = table_lines(sweep.rows, shown)
    notes = []
    if left_out:
        notes.append(f"left out for the width of {width}: {', '.join(left_out)}; sweep.csv has every column")
    errors = [f"{row.folder} ({row.name}): {row.status.replace('_', ' ')}: {row.error}" for row in sweep.rows if row.error]
    return [printable(line, width) for line in (*lines, *notes, *errors)]


def table_lines(rows: list[Row], shown: list[Column]) -> list[str]:
    """Heads and rows, every column as wide as its widest text, all lines of one length."""
    texts = [[column.head for column in shown], *([printable(cell(column, row)) for column in shown] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return [
        GAP.join(
            f"{text:>{width}}" if column.is_number else f"{text:<{width}}"
            for text, width, column in zip(line, widths, shown, strict=True)
        )
        for line in texts
    ]


def printable(text: str, width: int = 40) -> str:
    """`text` without what a terminal would obey, and not over `width` characters."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def totals(rows: list[Row]) -> str:
    """ "12 runs: 10 finished, 2 out of memory"."""
    counts: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row.status != FINISHED):
        counts[row.status] = counts.get(row.status, 0) + 1
    told = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in counts.items())
    return f"{len(rows)} run{'s' * (len(rows) != 1)}: {told}"


# ---- as files ----


def write_csv(sweep: Sweep, path: Path) -> None:
    """Every field of every row; what differs has a column for each key, and what is not known is empty."""
    names = [f.name for f in fields(Row) if f.name not in ("differs", "has_run")]
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow([*names, *sweep.keys])
        for row in sweep.rows:
            values = [getattr(row, name) for name in names] + [row.differs.get(key) for key in sweep.keys]
            lines.writerow(["" if value is None else value for value in values])


def write_sweep_json(sweep: Sweep, pictures: list[Picture], path: Path) -> None:
    """The same rows, where they were measured, and the fitted exponents. Raises UserError where it cannot be written."""
    growth = [
        {"panel": panel.title, "line": line.name, "exponent": line.law.exponent, "lengths": list(line.law.lengths)}
        for picture in pictures
        for panel in picture.panels
        for line in panel.lines
        if line.law is not None
    ]
    about = {name: getattr(sweep, name) for name in ("baseline", "commands", "machines", "versions", "dates", "warnings")}
    write_json(path, about | {"growth": growth, "rows": [asdict(row) for row in sweep.rows]})
