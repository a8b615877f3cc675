"""What the pictures of a sweep show: lines of points, with the lengths that ran out of memory and the fitted growth of memory.

Nothing is drawn here: sweep/pictures.py draws these lines, and the CSV beside each picture holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from flash_ladder.measure.growth import Growth, growth
from flash_ladder.names import OUT_OF_MEMORY
from flash_ladder.sweep.rows import Sweep
from flash_ladder.sweep.run_files import Row, curve, in_words
from flash_ladder.training import metrics
from flash_ladder.units import GIB

AT_ONE_LENGTH = 8  # lines of one point each that a picture over the length still shows
FITTED = 3  # an exponent is fitted to so many of the longest lengths


@dataclass(frozen=True)
class Line:
    """The points of one backend, or of one of its variants."""

    backend: str | None
    variant: str  # what tells it from the backend's other lines, "" where it has none
    points: dict[float, float]
    lost: tuple[float, ...] = ()  # x at which memory ran out
    law: Growth | None = None

    @property
    def name(self) -> str:
        return ", ".join(word for word in (self.backend, self.variant) if word) or "?"

    def crosses(self) -> dict[float, float | None]:
        """Where memory ran out: x, and what the line, continued, would have needed; None where no line can be continued."""
        return {x: None if self.law is None else self.law.bytes(int(x)) for x in self.lost}


@dataclass(frozen=True)
class Panel:
    """Lines over one axis."""

    title: str
    x: str  # "seq_len", "devices" or "step"
    y: str  # what the axis shows, with its unit
    unit: str  # "bytes", "share", "times", "tokens/s" or "nats"
    lines: list[Line]


@dataclass(frozen=True)
class Picture:
    """Panels side by side under one title."""

    name: str  # of its files: sweep_NAME.png
    title: str
    panels: list[Panel] = field(default_factory=list)


def pictures(sweep: Sweep) -> list[Picture]:
    """The pictures that the runs have something for, each with the panels that have a point."""
    over = sweep.baseline
    found = [
        Picture(
            "memory",
            f"Memory over sequence length; $S^p$: least squares in logarithms over the {FITTED} longest lengths that fit",
            [
                Panel("a run's peak, one device", "seq_len", "peak memory", "bytes", memory_lines(sweep.rows, peak_bytes)),
                Panel(
                    "one attention layer, one sequence",
                    "seq_len",
                    "memory, forward and backward",
                    "bytes",
                    memory_lines(sweep.rows, layer_bytes),
                ),
            ],
        ),
        Picture(
            "speed",
            "Speed over sequence length, all devices together",
            [
                Panel("tokens per second", "seq_len", "tokens/s", "tokens/s", lines(sweep.rows, lambda r: r.tokens_per_second)),
                Panel(
                    "share of the dense peak (MFU)",
                    "seq_len",
                    "MFU, full attention counted",
                    "share",
                    lines(sweep.rows, lambda r: r.mfu),
                ),
            ],
        ),
        Picture(
            "speedup",
            "Speed-up over sequence length",
            [
                Panel(f"a whole run, over {over}", "seq_len", f"tokens/s over {over}'s", "times", compared(sweep)),
                Panel("one attention layer, over eager", "seq_len", "eager's time over its own", "times", layer_speedups(sweep)),
            ],
        ),
        scaling(sweep),
        losses(sweep),
    ]
    shown = (replace(picture, panels=[panel for panel in picture.panels if has_points(panel)]) for picture in found)
    return [picture for picture in shown if picture.panels]


def has_points(panel: Panel) -> bool:
    """Whether a panel has anything to show: crosses alone have no place, and many runs of one length no line."""
    lengths = {x for line in panel.lines for x in line.points}
    if panel.x == "seq_len" and len(lengths) == 1 and len(panel.lines) > AT_ONE_LENGTH:
        return False
    return bool(lengths)


# ---- from rows to lines ----


def settings(row: Row) -> dict[str, str]:
    """What tells a run from others of its backend, in words; its batch mostly follows from these."""
    named = {"S": row.seq_len, "devices": row.n_devices, "nodes": row.n_nodes, "strategy": row.strategy}
    named |= {"precision": row.precision, "compile": row.compile, "gpu": row.gpu}
    differs = {key: value for key, value in row.differs.items() if key.rpartition(".")[2] not in named}
    return {key: str(value) for key, value in named.items() if value is not None} | differs


def variants(rows: list[Row], *leave_out: str) -> list[str]:
    """The words that tell each row's line from the others of its backend: the settings in which rows differ, but `leave_out`.

    The batch is among them only where the other settings do not tell all runs apart.
    """
    told = [settings(row) for row in rows]
    keys = [k for k in dict.fromkeys(k for t in told for k in t) if len({t[k] for t in told if k in t}) > 1]
    words = [", ".join(in_words({k: t[k] for k in keys if k in t and k not in leave_out})) for t in told]
    whole = [(row.backend, *(t.get(key) for key in keys)) for row, t in zip(rows, told, strict=True)]
    batches = [f"batch={row.batch_size}x{row.accumulate}" for row in rows]
    if len({*zip(whole, batches, strict=True)}) == len({*whole}):
        return words
    return [", ".join(w for w in (word, batch) if w) for word, batch in zip(words, batches, strict=True)]


def lines(rows: list[Row], figure: Callable[[Row], float | None], power: bool = False) -> list[Line]:
    """A line over seq_len for each backend and variant; of runs alike in all settings the last one counts."""
    rows = [row for row in rows if row.seq_len is not None and (figure(row) is not None or row.status == OUT_OF_MEMORY)]
    found: dict[tuple[str | None, str], list[Row]] = {}
    for row, variant in zip(rows, variants(rows, "S"), strict=True):
        found.setdefault((row.backend, variant), []).append(row)
    drawn = []
    for (backend, variant), of_line in found.items():
        values = {float(row.seq_len or 0): figure(row) for row in of_line}
        points = {x: y for x, y in sorted(values.items()) if y is not None}
        lost = tuple(sorted(x for x, y in values.items() if y is None))
        law = growth({int(x): y for x, y in points.items()}, last=FITTED) if power else None
        drawn.append(Line(backend, variant, points, lost if power else (), law))
    return [line for line in drawn if line.points or line.lost]


def memory_lines(rows: list[Row], figure: Callable[[Row], float | None]) -> list[Line]:
    """Lines of bytes, with their growth and the lengths that ran out of memory."""
    return lines(rows, figure, power=True)


def peak_bytes(row: Row) -> float | None:
    """Peak of a run that got through."""
    return None if row.peak_gib is None or row.status == OUT_OF_MEMORY else row.peak_gib * GIB


def layer_bytes(row: Row) -> float | None:
    """One layer's attention, a sequence of the batch: batches differ between lengths, and so would their totals."""
    return None if not row.attention_gib or not row.batch_size else row.attention_gib * GIB / row.batch_size


def compared(sweep: Sweep) -> list[Line]:
    """Speed of runs over the baseline's, which is 1 by definition and left out."""
    return lines([row for row in sweep.rows if row.backend != sweep.baseline], lambda row: row.speedup)


def layer_speedups(sweep: Sweep) -> list[Line]:
    """Speed of one layer over eager's."""
    return lines([row for row in sweep.rows if row.backend != "eager"], lambda row: row.attention_speedup)


# ---- over devices, and over steps ----


def scaling(sweep: Sweep) -> Picture:
    """Speed and efficiency over the number of devices, where runs differ in it; each strategy is a line."""
    rows = [row for row in sweep.rows if row.n_devices and row.tokens_per_second]
    counts = {row.n_devices for row in rows}
    picture = Picture("scaling", "Scaling over devices")
    if len(counts) < 2:
        return picture
    any_strategy = variants(rows, "devices", "nodes", "strategy")
    told = list(zip(rows, zip(variants(rows, "devices", "nodes"), any_strategy, strict=True), strict=True))
    found: dict[tuple[str | None, str], dict[float, float]] = {}
    fewest: dict[tuple[str | None, str], Row] = {}  # the run on the fewest devices, whatever its strategy
    for row, (variant, base) in told:
        found.setdefault((row.backend, variant), {})[float(row.n_devices or 0)] = row.tokens_per_second or 0.0
        kept = fewest.setdefault((row.backend, base), row)
        if (row.n_devices or 0) < (kept.n_devices or 0):
            fewest[row.backend, base] = row
    bases = {(row.backend, variant): fewest[row.backend, base] for row, (variant, base) in told}
    speeds, shares = [], []
    for (backend, variant), points in found.items():
        first = bases[backend, variant]
        n, speed = first.n_devices or 1, first.tokens_per_second or 1.0
        points = dict(sorted({float(n): speed, **points}.items()))
        if len(points) > 1:
            speeds.append(Line(backend, variant, points))
            shares.append(Line(backend, variant, {x: y / x / (speed / n) for x, y in points.items()}))
    low = min(counts, key=lambda n: n or 0)
    against = "one device" if low == 1 else f"{low} devices"
    panels = [
        Panel("tokens per second", "devices", "tokens/s", "tokens/s", speeds),
        Panel(f"efficiency: speed a device, over that of {against}", "devices", "efficiency", "share", shares),
    ]
    return replace(picture, panels=panels)


def losses(sweep: Sweep) -> Picture:
    """Loss over optimiser steps, in training and in validation, a line for each run."""
    words = variants(sweep.rows)
    told = [(row.backend, word) for row, word in zip(sweep.rows, words, strict=True)]
    names = [word if told.count((row.backend, word)) == 1 else row.folder for row, word in zip(sweep.rows, words, strict=True)]
    panels = []
    for title, metric in (("training", metrics.TRAIN_LOSS), ("validation", metrics.VAL_LOSS)):
        found = []
        for row, variant in zip(sweep.rows, names, strict=True):
            points = {float(step): loss for step, loss in curve(sweep.folder / row.folder, metric).items()}
            if points:
                found.append(Line(row.backend, variant, points))
        panels.append(Panel(title, "step", "loss, nats per token", "nats", found))
    return Picture("loss", "Loss over optimiser steps", panels)
