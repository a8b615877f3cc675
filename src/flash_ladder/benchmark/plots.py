"""The attention benchmark's pictures, for a page and for a slide: speed, memory and error.

A picture has four panels at most. It shows causal attention where that was measured; the tables have full attention too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from flash_ladder.benchmark.looks import add_legend, full_name
from flash_ladder.benchmark.result import GIB, GRADIENTS, Cell, Panel, Result
from flash_ladder.benchmark.tables import eager_error
from flash_ladder.drawing import (
    FAINT,
    LABEL_SIZE,
    STYLE,
    WIDTH,
    Label,
    add_labels,
    bytes_in_words,
    figure_with_labels,
    ink,
    line_style,
    looks,
    save,
    set_lengths,
)
from flash_ladder.measure.growth import Growth, growth
from flash_ladder.names import is_kernel

PANELS = 2  # side by side in a picture; speed has two rows of them
RESULT_MARKERS = {"output": "o", "dq": "s", "dk": "^", "dv": "D"}
BREAK = 2.0  # the axis of speed may break between two neighbouring figures if the higher is over this multiple of the lower
LOW_SHARE = 0.15  # the lower figure at such a break is less than this share of the highest
ALIKE = 0.02  # lines of memory that differ by less than this everywhere share a label


def plot(result: Result, path: Path) -> list[Path]:
    """Draws the figures that `result` has: speed in NAME.png, memory in NAME_memory.png, errors in NAME_error.png.

    Each is also written as SVG. Returns the files written. Raises OSError where one cannot be written.
    """
    drawn = {
        path: (draw_speed, any(cell.forward_tflops for cell in result.cells)),
        path.with_stem(f"{path.stem}_memory"): (draw_memory, any(cell.peak_gib for cell in result.cells)),
        path.with_stem(f"{path.stem}_error"): (draw_errors, any(error.output for error in result.errors)),
    }
    written = []
    for file, (draw, has_figures) in drawn.items():
        if has_figures:
            with rc_context(STYLE):
                written += save(draw(result), file)
    return written


def shown(panels: list[Panel]) -> list[Panel]:
    """The panels of a picture: the first causal ones, or those of full attention where nothing causal was measured."""
    return ([panel for panel in panels if panel.causal] or panels)[:PANELS]


def add_caption(figure: Figure, result: Result, what: str) -> None:
    """Adds a title (`what`) and a second line: where and when it was measured, and whether panels are left out."""
    versions = [f"{name} {getattr(result, name)}" for name in ("torch", "triton", "cudnn") if getattr(result, name)]
    where = " · ".join([result.device, result.config["dtype"], *versions, *([result.date] if result.date else [])])
    more = "" if len(shown(result.panels)) == len(result.panels) else " · other shapes: in the tables"
    figure.suptitle(f"{what}\n{where}{more}", x=0.02, ha="left", fontsize=14)


# ---- speed ----


def draw_speed(result: Result) -> Figure:
    """TFLOP/s over sequence length, forward above backward, a column for each panel; figures at the longest length.

    The axis is broken where eager and flash_v1 are so slow that they would lie on its bottom.
    """
    timed = [cell for cell in result.cells if cell.forward_tflops is not None]
    panels = shown(list(dict.fromkeys(cell.panel for cell in timed)))
    timed = [cell for cell in timed if cell.panel in panels]
    lengths = sorted({cell.seq_len for cell in timed})
    backends = [backend for backend in result.backends if any(cell.backend == backend for cell in timed)]
    speeds = [speed for cell in timed for speed in (cell.forward_tflops, cell.backward_tflops) if speed]
    ends = split(speeds)  # of the upper and the lower part, from the top
    figure, room = figure_with_labels(len(panels), labels=2.45, height=9.8, bottom=1.75)
    ways = figure.add_gridspec(2, 1, **room, hspace=0.2)
    for way, name in enumerate(("forward", "backward")):
        heights = (3.4, 1)[: len(ends)]
        grid = ways[way].subgridspec(len(ends), len(panels), height_ratios=heights, hspace=0.06, wspace=room["wspace"])
        for column, panel in enumerate(panels):
            parts = [figure.add_subplot(grid[part, column]) for part in range(len(ends))]
            for axis, (low, high) in zip(parts, ends, strict=True):
                draw_speed_lines(
                    axis,
                    result,
                    [cell for cell in timed if cell.panel == panel],
                    f"{name}_tflops",
                    low,
                    high,
                    6 if axis is parts[0] else 3,
                )
                set_lengths(axis, lengths)
            for axis in parts[:-1]:
                axis.tick_params(bottom=False, labelbottom=False)
                axis.set_xlabel("")
            if len(parts) > 1:
                mark_break(*parts)
            if name == "forward":
                parts[-1].set_xlabel("")
                parts[0].set_title(panel.title, loc="left", fontweight="bold")
            if column == 0:
                parts[0].set_ylabel(f"{name}, TFLOP/s")
    cfg = result.config
    share = f"; % of the GPU's dense peak, {result.peak:,.0f} TFLOP/s" if result.peak else ""
    tokens = f"batch · length = {cfg['tokens']:,}, heads · head_dim = {cfg['width']:,}"
    add_caption(figure, result, f"Attention speed ({tokens}{share})")
    one_way = {backend for backend in backends if not any(cell.backward_tflops for cell in timed if cell.backend == backend)}
    add_legend(figure, result, {b: ", forward alone" if b in one_way else "" for b in backends})
    return figure


def split(speeds: list[float]) -> list[tuple[float, float]]:
    """The ends of the axis of speed: one part from 0, or an upper and a lower one where nothing lies between."""
    ordered, highest = sorted(speeds), max(speeds)
    gaps = [(below, above) for below, above in pairwise(ordered) if below < LOW_SHARE * highest and above > BREAK * below]
    if not gaps:
        return [(0.0, 1.06 * highest)]
    below, above = max(gaps)
    return [(0.85 * above, 1.04 * highest), (0.0, 1.25 * below)]


def draw_speed_lines(axis: Axes, result: Result, cells: list[Cell], figure_of: str, low: float, high: float, n_ticks: int) -> None:
    """Draws every backend's line between `low` and `high`, and its figure at the longest length."""
    axis.set_ylim(low, high)
    axis.yaxis.set_major_locator(MaxNLocator(n_ticks))
    labels = []
    for backend, look in looks(result.backends).items():
        found = {c.seq_len: getattr(c, figure_of) for c in cells if c.backend == backend and getattr(c, figure_of) is not None}
        axis.plot(list(found), list(found.values()), **line_style(backend, look))
        if found and low <= found[max(found)] <= high:
            speed = found[max(found)]
            share = f" · {100 * speed / result.peak:.0f} %" if result.peak and speed >= 100 else ""
            text = f"{backend} {speed:.{0 if speed >= 100 else 1}f}{share}"
            labels.append(Label(text, max(found), speed, ink(look[0]), is_kernel(backend)))
    axis.margins(x=0.06)
    axis.autoscale_view(scaley=False)
    add_labels(axis, labels)


def mark_break(upper: Axes, lower: Axes) -> None:
    """Draws two slanted strokes where the axis is broken."""
    upper.spines.bottom.set_visible(False)
    slanted = [(-1, -0.6), (1, 0.6)]
    for axis, y in ((upper, 0), (lower, 1)):
        axis.plot([0], [y], transform=axis.transAxes, marker=slanted, ms=9, linestyle="none", color="k", mew=1, clip_on=False)


# ---- memory ----


def draw_memory(result: Result) -> Figure:
    """Peak bytes of one sequence over its length, both logarithmic, with the fitted power of the length at the end of a line.

    Where a backend ran out of memory, a cross stands at what its line, continued, would have needed.
    """
    panels = shown(list(dict.fromkeys(cell.panel for cell in result.cells if cell.peak_gib)))
    lengths = sorted({cell.seq_len for cell in result.cells})
    figure, room = figure_with_labels(len(panels), labels=3.1, height=7.2, bottom=1.75)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True, gridspec_kw=room)[0]
    points = [n for panel in panels for b in result.backends for n in memory_points(result, panel, b).values()]
    for axis, panel in zip(axes, panels, strict=True):
        set_lengths(axis, lengths)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda n, _: bytes_in_words(n)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.tick_params(labelleft=True)
        axis.set_ylim(min(points) / 2, 2 * max(*points, (result.device_gib or 0) * GIB))
        axis.margins(x=0.06)
        if result.device_gib:
            axis.axhline(result.device_gib * GIB, color=FAINT, linewidth=1, linestyle=":")
            axis.annotate(f"the GPU has {result.device_gib:.0f} GiB", (lengths[0], result.device_gib * GIB), va="bottom")
        add_labels(axis, list(draw_memory_lines(axis, result, panel)), lines_each=2)
        axis.set_title(panel.title, loc="left", fontweight="bold")
    axes[0].set_ylabel("peak memory of one sequence")
    heads = f"forward and backward, above the inputs, heads · head_dim = {result.config['width']:,}; growth with the length S"
    add_caption(figure, result, f"Attention memory ({heads})")
    add_legend(figure, result, {b: "" for b in result.backends if any(result.sequence_bytes(panel, b) for panel in panels)})
    return figure


def memory_points(result: Result, panel: Panel, backend: str) -> dict[int, float]:
    """Bytes of one sequence by seq_len. Where the backend ran out of memory, they are what its line, continued, would need."""
    found = result.sequence_bytes(panel, backend)
    law, gone = growth(found), result.out_of_memory_at(panel, backend)
    return found | ({gone: law.bytes(gone)} if law and gone else {})


def draw_memory_lines(axis: Axes, result: Result, panel: Panel) -> Iterator[Label]:
    """Draws every backend's memory and where it ends; yields a label for each line, and one for lines that lie on each other."""
    by_name = looks(result.backends)
    for together in alike(result, panel):
        for number, backend in enumerate(together):
            found, style = result.sequence_bytes(panel, backend), line_style(backend, by_name[backend])
            if len(together) > 1:  # dashes leave room for each other's colours, and markers lie inside each other
                dash = 4.0
                style |= {"linewidth": 3.2, "linestyle": (number * dash, (dash, dash * (len(together) - 1)))}
                style |= {"markersize": 14 - 4 * number, "zorder": 3 + number, "dash_capstyle": "butt"}
            axis.plot(list(found), list(found.values()), **style)
        backend = together[0]
        found, law = result.sequence_bytes(panel, backend), growth(result.sequence_bytes(panel, backend))
        colour = by_name[backend][0] if len(together) == 1 else FAINT
        power = "" if law is None else f"  $S^{{{law.exponent:.2f}}}$"
        names, last = " ≈ ".join(together), max(found)
        gone = result.out_of_memory_at(panel, backend)
        if law is None or gone is None:
            text = f"{names}\n{bytes_in_words(found[last])}{power}"
            yield Label(text, last, found[last], ink(colour), all(map(is_kernel, together)))
        else:
            draw_out_of_memory(axis, found, law, gone, colour)
            text = f"{names}{power}\nout of memory: needs {bytes_in_words(law.bytes(gone))}"
            yield Label(text, gone, law.bytes(gone), ink(colour), all(map(is_kernel, together)))


def alike(result: Result, panel: Panel) -> list[list[str]]:
    """The backends with figures of memory, in groups whose lines lie on each other."""
    groups: list[list[str]] = []
    for backend in result.backends:
        points = memory_points(result, panel, backend)
        for group in groups if points else []:
            others = memory_points(result, panel, group[0])
            if others.keys() == points.keys() and all(abs(points[s] / others[s] - 1) < ALIKE for s in points):
                group.append(backend)
                break
        else:
            groups += [[backend]] if points else []
    return groups


def draw_out_of_memory(axis: Axes, found: dict[int, float], law: Growth, gone: int, colour: str) -> None:
    """Continues a line to the length at which memory ran out, and draws a cross there."""
    last = max(found)
    axis.plot([last, gone], [found[last], law.bytes(gone)], color=colour, linestyle=":", linewidth=1.6)
    axis.plot([gone], [law.bytes(gone)], color=colour, marker="X", markersize=12, linestyle="", zorder=4)


# ---- errors ----


def draw_errors(result: Result) -> Figure:
    """Each backend's errors as multiples of eager's in the same dtype: 1 is as good as eager, less is better."""
    panels = shown(list(dict.fromkeys(error.panel for error in result.errors)))
    backends = [b for b in dict.fromkeys(error.backend for error in result.errors) if b != "eager"]
    by_name = looks(dict.fromkeys([*result.backends, *backends]))
    width, height = max(WIDTH, 3.0 + 5.6 * len(panels)), 2.5 + 0.52 * len(backends)
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    room = {"left": 4.1 / width, "right": 1 - 1.65 / width, "top": 1 - 1.15 / height, "bottom": 1.15 / height}
    figure.subplots_adjust(**room, wspace=0.46)
    for axis, panel in zip(axes, panels, strict=True):
        of_panel = [error for error in result.errors if error.panel == panel]
        eager = eager_error(of_panel)
        for error in of_panel:
            if error.backend == "eager":
                continue
            row, ratios = backends.index(error.backend), {}
            for offset, name in zip((-0.27, -0.09, 0.09, 0.27), ("output", *GRADIENTS), strict=True):
                value, yardstick = getattr(error, name), getattr(eager, name, None)
                if value is not None and yardstick:
                    ratios[name] = value / yardstick
                    axis.plot(ratios[name], row + offset, RESULT_MARKERS[name], color=by_name[error.backend][0], markersize=7)
            if ratios:
                axis.annotate(
                    f"≤ {max(ratios.values()):.2f}" + (f" ({' and '.join(ratios)})" if len(ratios) < len(RESULT_MARKERS) else ""),
                    (1.02, row),
                    xycoords=("axes fraction", "data"),
                    va="center",
                    fontsize=LABEL_SIZE,
                    fontweight="bold" if is_kernel(error.backend) else "normal",
                    color=ink(by_name[error.backend][0]),
                )
        axis.axvline(1, color=by_name.get("eager", ("#000000",))[0], linewidth=1.6)
        axis.set_title(panel.title, loc="left", fontweight="bold")
        axis.set_xlabel("error / eager's error")
    axes[0].set_yticks(range(len(backends)), [full_name(backend, result) for backend in backends])
    for tick, backend in zip(axes[0].get_yticklabels(), backends, strict=True):
        tick.set_fontweight("bold" if is_kernel(backend) else "normal")
    axes[0].set_ylim(len(backends) - 0.4, -0.6)
    axes[0].set_xlim(left=0, right=1.05 * max(axes[0].get_xlim()[1], 1))  # shared, once every point is drawn
    length = result.config["error_seq_len"]
    add_caption(figure, result, f"Attention error against float64, in multiples of eager's (rms, sequence length {length:,})")
    handles = [Line2D([], [], marker=m, linestyle="", color=FAINT, label=name) for name, m in RESULT_MARKERS.items()]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=LABEL_SIZE)
    return figure
