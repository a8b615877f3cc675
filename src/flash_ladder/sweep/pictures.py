"""The pictures of a sweep, drawn: PNG, SVG, and the plotted numbers as CSV.

Colours are the backends'. Lines of one backend differ in their dashes, and where there is but one backend, in their colours.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from flash_ladder.drawing import (
    FAINT,
    LABEL_SIZE,
    LOOKS,
    SPARE_COLOURS,
    SPARE_MARKERS,
    STYLE,
    Label,
    add_labels,
    bytes_in_words,
    figure_with_labels,
    ink,
    length_in_words,
    line_style,
    looks,
    save,
)
from flash_ladder.names import is_kernel
from flash_ladder.sweep.rows import Sweep
from flash_ladder.sweep.series import Line, Panel, Picture

HEIGHT = 6.6  # inches
LABEL_WIDTH = 25  # characters of a label's line
ONE_LINE = 18  # characters of a name that leave room for a figure on the same line
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
SINGLE = ("#0072b2", "#d55e00", "#009e73", "#882255", "#e69f00", "#56b4e9", *SPARE_COLOURS)  # for the lines of one backend


def draw_pictures(pictures: list[Picture], sweep: Sweep, out: Path) -> dict[str, list[Path]]:
    """Writes every picture into `out` as sweep_NAME.png, .svg and .csv; returns the files by the picture's name.

    Raises OSError where one cannot be written.
    """
    written = {}
    for picture in pictures:
        png = out / f"sweep_{picture.name}.png"
        with rc_context(STYLE):
            files = save(draw(picture, sweep), png)
        write_points(picture, png.with_suffix(".csv"))
        written[picture.name] = [*files, png.with_suffix(".csv")]
    return written


def write_points(picture: Picture, path: Path) -> None:
    """The plotted numbers: a line for each point, and for each length that ran out of memory."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["panel", "line", picture.panels[0].x, "value", "unit", "status", "exponent"])
        for panel in picture.panels:
            for line in panel.lines:
                power = "" if line.law is None else f"{line.law.exponent:.4f}"
                for x, y in line.points.items():
                    rows.writerow([panel.title, line.name, f"{x:g}", f"{y:.9g}", panel.unit, "measured", power])
                for x in line.lost:
                    rows.writerow([panel.title, line.name, f"{x:g}", "", panel.unit, "out of memory", power])


# ---- one picture ----


def draw(picture: Picture, sweep: Sweep) -> Figure:
    """Panels side by side, each with labels at the ends of its lines."""
    figure, room = figure_with_labels(len(picture.panels), labels=3.1, height=HEIGHT, bottom=0.95)
    axes = figure.subplots(1, len(picture.panels), squeeze=False, gridspec_kw=room)[0]
    where = [*sweep.machines[:2], *(line.split(", triton")[0] for line in sweep.versions[:1]), *sweep.dates[-1:]]
    styles = line_styles([line for panel in picture.panels for line in panel.lines])
    for axis, panel in zip(axes, picture.panels, strict=True):
        draw_panel(axis, panel, styles)
        axis.set_title(panel.title, loc="left", fontweight="bold")
        axis.set_ylabel(panel.y)
    if any(len(axis.texts) < len(panel.lines) for axis, panel in zip(axes, picture.panels, strict=True)):
        where.append("lines without a label: in the CSV")
    figure.suptitle(f"{picture.title}\n{' · '.join(where)}", x=0.02, ha="left", fontsize=14)
    return figure


def line_styles(lines: list[Line]) -> dict[str, dict]:
    """The style of each line, by its name, the same in every panel."""
    backends = list(dict.fromkeys(line.backend or "?" for line in lines))
    by_backend = looks(backends)
    numbers: dict[str, dict[str, int]] = {}
    for line in lines:
        of_backend = numbers.setdefault(line.backend or "?", {})
        of_backend.setdefault(line.name, len(of_backend))
    styles = {}
    for line in lines:
        backend = line.backend or "?"
        number, several = numbers[backend][line.name], len(numbers[backend]) > 1
        style = line_style(backend, by_backend[backend])
        if several and len(backends) == 1:
            colour = SINGLE[number % len(SINGLE)]
            marker = [*(look[1] for look in LOOKS.values()), *SPARE_MARKERS][number % 12]
            style |= {"color": colour, "marker": marker, "markerfacecolor": colour, "linewidth": 2, "linestyle": "-"}
        elif several:
            style |= {"linestyle": DASHES[number % len(DASHES)], "linewidth": 2}
        styles[line.name] = style
    return styles


def draw_panel(axis: Axes, panel: Panel, styles: dict[str, dict]) -> None:
    """Sets the axes, then draws the lines, the crosses where memory ran out, and the labels."""
    set_x(axis, panel)
    set_y(axis, panel)
    lowest, highest = extent(panel)
    for line in panel.lines:
        style = dict(styles[line.name])
        if panel.unit == "nats":
            many = max(map(len, (each.points for each in panel.lines))) > 12
            style |= {"linewidth": min(style["linewidth"], 2), "markersize": 0 if many and len(line.points) > 1 else 5}
        axis.plot(list(line.points), list(line.points.values()), **style)
        for x, needed in line.crosses().items():
            y = highest if needed is None else needed
            if line.points and needed is not None:
                last = max(line.points)
                axis.plot([last, x], [line.points[last], y], color=style["color"], linestyle=":", linewidth=1.6)
            axis.plot([x], [y], color=style["color"], marker="X", markersize=12, linestyle="", zorder=5)
    if panel.unit == "bytes":
        margin = 1.6 if highest > 4 * lowest else 4
        axis.set_ylim(lowest / margin, highest * margin)
    elif panel.unit == "nats":
        axis.margins(y=0.06)
    else:
        axis.set_ylim(0, 1.08 * highest)
    if panel.x == "step":
        axis.set_xlim(0, 1.05 * max(x for line in panel.lines for x in line.points))
    axis.margins(x=0.07)
    axis.autoscale_view(scalex=panel.x != "step", scaley=False)
    if panel.unit == "times" or (panel.unit == "share" and panel.x == "devices"):
        axis.axhline(1, color=FAINT, linewidth=1, linestyle=":", zorder=1)
    labels = end_labels(panel, styles, highest)
    add_labels(axis, labels, lines_each=max((label.text.count("\n") + 1 for label in labels), default=1))


def extent(panel: Panel) -> tuple[float, float]:
    """The lowest and the highest value that is drawn."""
    values = [y for line in panel.lines for y in line.points.values()]
    needs = [y for line in panel.lines for y in line.crosses().values() if y is not None]
    unknown = any(y is None for line in panel.lines for y in line.crosses().values())
    highest = max([*values, *needs])
    if panel.unit == "times":
        highest = max(highest, 1.0)
    return max(min(values), 1e-12), (2 * highest if unknown else highest) or 1.0


def set_x(axis: Axes, panel: Panel) -> None:
    """A logarithmic axis of lengths or devices, or a linear one of steps."""
    if panel.x == "step":
        axis.set_xlabel("optimiser step")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return
    places = sorted({x for line in panel.lines for x in (*line.points, *line.lost)})
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(apart(places)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: length_in_words(x) if panel.x == "seq_len" else f"{x:g}"))
    axis.set_xlabel("sequence length, tokens" if panel.x == "seq_len" else "devices")


def apart(places: list[float], share: float = 0.17) -> list[float]:
    """Those of sorted places, from the last one down, that lie at least `share` of a logarithmic axis apart."""
    kept: list[float] = []
    span = math.log2(places[-1] / places[0]) if places else 0.0
    for place in reversed(places):
        if not kept or math.log2(kept[-1] / place) >= share * span - 1e-9:
            kept.append(place)
    return kept[::-1]


def set_y(axis: Axes, panel: Panel) -> None:
    """An axis of bytes by powers of two or four, or a linear one in the panel's unit."""
    if panel.unit == "bytes":
        low, high = extent(panel)
        axis.set_yscale("log", base=2)
        doublings = math.log2(high / low) + (1.4 if high > 4 * low else 4)
        axis.yaxis.set_major_locator(LogLocator(base=2.0 ** max(1, round(doublings / 7)), numticks=20))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda n, _: bytes_in_words(n)))
    elif panel.unit == "share":
        axis.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    elif panel.unit == "tokens/s":
        axis.yaxis.set_major_formatter(FuncFormatter(lambda n, _: count_in_words(n)))
    elif panel.unit == "times":
        axis.yaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g} x"))


def count_in_words(n: float) -> str:
    """ "12.5k" for 12,500."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:.3g}{name}"
    return f"{n:.3g}"


def end_labels(panel: Panel, styles: dict[str, dict], highest: float) -> list[Label]:
    """A label for each line, at its last point or its first cross."""
    found = []
    alone = len({line.backend for line in panel.lines}) == 1  # then what differs is name enough
    longest = max(len(line.variant if alone and line.variant else line.name) for line in panel.lines)
    apart_by = "\n" if panel.unit == "bytes" or longest > ONE_LINE else "  "
    for line in panel.lines:
        colour, bold = ink(styles[line.name]["color"]), is_kernel(line.backend or "")
        name = shortened(line.variant if alone and line.variant else line.name)
        power = "" if line.law is None else f"  $S^{{{line.law.exponent:.2f}}}$"
        crosses = line.crosses()
        if crosses:
            x = min(crosses)
            needed = crosses[x]
            need = "" if needed is None else f", needs {bytes_in_words(needed)}"
            text = f"{name}{power}\nout at {length_in_words(x)}{need}"
            found.append(Label(text, x, highest if needed is None else needed, colour, bold))
        elif line.points:
            x = max(line.points)
            y = line.points[x]
            text = f"{name}{apart_by}{value_in_words(y, panel.unit)}{power}"
            found.append(Label(text, x, y, colour, bold))
    if len(found) <= room_for(found):
        return found
    by_height = sorted(found, key=lambda label: label.y)
    half = room_for(found) // 2
    return [*by_height[:half], *by_height[-half:]]


def room_for(labels: list[Label]) -> int:
    """How many labels fit beside a panel."""
    two_lines = any("\n" in label.text for label in labels)
    return int((HEIGHT - 2.1) * 72 / LABEL_SIZE / (2.9 if two_lines else 1.25))


def shortened(name: str) -> str:
    """A name that fits into a label's line."""
    return name if len(name) <= LABEL_WIDTH else f"{name[: LABEL_WIDTH - 1]}…"


def value_in_words(value: float, unit: str) -> str:
    """A figure beside the end of its line."""
    if unit == "bytes":
        return bytes_in_words(value)
    if unit == "share":
        return f"{100 * value:.3g} %"
    if unit == "tokens/s":
        return count_in_words(value)
    return f"{value:.3g} x" if unit == "times" else f"{value:.3f}"
