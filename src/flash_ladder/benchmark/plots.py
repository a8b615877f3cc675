"""The attention benchmark's pictures: speed, memory and error, a colour and a marker for each backend throughout."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from flash_ladder.benchmark.result import GIB, GRADIENTS, Panel, Result, growth
from flash_ladder.benchmark.tables import eager_error
from flash_ladder.units import size

LOOKS = {  # colour, marker; the rungs have the loud ones
    "eager": ("#222222", "o"),
    "sdpa": ("#8a8a8a", "o"),
    "flash_v1": ("#f2a100", "o"),
    "flash_v2": ("#d7191c", "o"),
    "flash_v3": ("#8e1bd1", "o"),
    "fa2": ("#1f77b4", "s"),
    "cudnn": ("#2e9e3f", "^"),
    "efficient": ("#8c564b", "v"),
    "math": ("#b8a88a", "x"),
    "flex": ("#17a7b8", "D"),
    "flash_attn": ("#0b3d91", "P"),
    "fa3": ("#7c8f00", "*"),
    "fa4": ("#e377c2", "X"),
}
RESULT_MARKERS = {"output": "o", "dq": "s", "dk": "^", "dv": "D"}
STYLE = {"font.size": 10, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "figure.dpi": 110}


def plot(result: Result, path: Path) -> list[Path]:
    """Draws what `result` has figures for: speed in NAME.png, memory in NAME_memory.png, errors in NAME_error.png.

    Returns the files written. Raises OSError where they cannot be.
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
                draw(result).savefig(file)
            written.append(file)
    return written


def is_rung(backend: str) -> bool:
    """One of this repository's kernels."""
    return backend.startswith("flash_v")


def line_style(backend: str) -> dict:
    """How a backend's line looks: a rung's is bold and drawn last."""
    colour, marker = LOOKS[backend]
    rung = is_rung(backend)
    return {
        "color": colour,
        "marker": marker,
        "linewidth": 3.0 if rung else 1.4,
        "markersize": 7 if rung else 5,
        "linestyle": "--" if backend == "sdpa" else "-",  # it is one of the others, so that its line covers theirs
        "zorder": 3 if rung else 2,
    }


def caption(result: Result, what: str) -> str:
    """A title: what, and in a second line where and when."""
    versions = [f"{name} {getattr(result, name)}" for name in ("torch", "triton", "cudnn") if getattr(result, name)]
    return f"{what}\n" + " · ".join([result.device, result.config["dtype"], *versions, *([result.date] if result.date else [])])


def set_lengths(axis: Axes, lengths: list[int]) -> None:
    """A logarithmic axis of sequence lengths, "4k" for 4096."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(lengths))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{s / 1024:.0f}k" if s >= 1024 and s % 1024 == 0 else f"{s:.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("sequence length, tokens")


def add_legend(figure: Figure, backends: list[str], height: float) -> None:
    """One line for each backend, under the panels."""
    handles = [Line2D([], [], label=backend, **line_style(backend)) for backend in backends]
    figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 7), frameon=False, bbox_to_anchor=(0.5, 0.0))
    rows = -(-len(handles) // 7)
    figure.tight_layout(rect=(0, (0.06 + 0.24 * rows) / height, 1, 1))


def draw_speed(result: Result) -> Figure:
    """TFLOP/s over sequence length, forward above backward, a column for each panel; on the right the share of the GPU's peak."""
    panels = result.panels
    width, height = max(7.5, 3.5 * len(panels) + 0.8), 7.2
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(2, len(panels), sharey="row", squeeze=False)
    timed = [cell for cell in result.cells if cell.forward_tflops is not None]
    lengths = sorted({cell.seq_len for cell in timed})
    for axis_row, figure_of, name in zip(axes, ("forward_tflops", "backward_tflops"), ("forward", "backward"), strict=True):
        for axis, panel in zip(axis_row, panels, strict=True):
            for backend in result.backends:
                cells = [c for c in timed if (c.backend, c.panel) == (backend, panel) and getattr(c, figure_of) is not None]
                axis.plot([c.seq_len for c in cells], [getattr(c, figure_of) for c in cells], **line_style(backend))
            set_lengths(axis, lengths)
        axis_row[0].set_ylim(bottom=0)  # shared along the row, once every line is drawn
        axis_row[0].set_ylabel(f"{name}, TFLOP/s")
        if result.peak:
            percent = 100 / result.peak
            to_percent, from_percent = (lambda t, percent=percent: t * percent), (lambda p, percent=percent: p / percent)
            right = axis_row[-1].secondary_yaxis("right", functions=(to_percent, from_percent))
            right.set_ylabel("% of the GPU's peak")
    for axis, panel in zip(axes[0], panels, strict=True):
        axis.set_title(panel.title)
        axis.set_xlabel("")
    cfg = result.config
    tokens = f"batch · length = {cfg['tokens']:,}, heads · head_dim = {cfg['width']:,}"
    figure.suptitle(caption(result, f"Attention speed ({tokens})"), fontsize=12)
    add_legend(figure, [b for b in result.backends if any(c.backend == b for c in timed)], height)
    return figure


def draw_memory(result: Result) -> Figure:
    """Peak bytes of one sequence over its length, both logarithmic; the legends give the fitted power of the length.

    Where a backend ran out of memory, a cross stands at what its line, continued, would have needed.
    """
    panels = result.panels
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    width, height = max(7.5, 3.9 * columns + 0.6), 5.4 * rows
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    lengths = sorted({cell.seq_len for cell in result.cells})
    highest = 1.0
    for axis, panel in zip(axes.flat, panels, strict=False):
        for backend in result.backends:
            highest = max(highest, draw_memory_line(axis, result, panel, backend))
        if result.device_gib:
            axis.axhline(result.device_gib * GIB, color="#555555", linewidth=1, linestyle=":")
            axis.annotate("the GPU's memory", (lengths[0], result.device_gib * GIB), va="bottom", fontsize=8)
        set_lengths(axis, lengths)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda n, _: size(n) if n < 2**40 else f"{n / 2**40:g} TiB"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_title(panel.title)
        if any(result.out_of_memory_at(panel, backend) for backend in result.backends):
            axis.plot([], [], "X", color="#555555", markersize=9, label="out of memory")
        axis.legend(loc="upper left", fontsize=8, framealpha=0.85, ncols=2, handlelength=1.6, columnspacing=0.9)
    lowest = min(n for panel in panels for b in result.backends for n in result.sequence_bytes(panel, b).values())
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    axes[0][0].set_ylim(lowest / 2, max(highest, (result.device_gib or 0) * GIB) * 2**7)  # room for the legends on top
    for axis_row in axes:
        axis_row[0].set_ylabel("peak memory of one sequence")
    heads = f"forward and backward, above the inputs, heads · head_dim = {result.config['width']:,}"
    figure.suptitle(caption(result, f"Attention memory ({heads})"), fontsize=12)
    figure.tight_layout()
    return figure


def draw_memory_line(axis: Axes, result: Result, panel: Panel, backend: str) -> float:
    """One backend's memory, and where it ends; returns the highest figure drawn, in bytes."""
    found = result.sequence_bytes(panel, backend)
    if not found:
        return 0.0
    law = growth(found)
    label = backend if law is None else f"{backend}  $S^{{{law.exponent:.2f}}}$"
    style = line_style(backend)
    axis.plot(list(found), list(found.values()), label=label, **style)
    gone = result.out_of_memory_at(panel, backend)
    if law is None or gone is None:
        return max(found.values())
    last = max(found)
    axis.plot([last, gone], [found[last], law.bytes(gone)], color=style["color"], linestyle=":", linewidth=1.4)
    axis.plot([gone], [law.bytes(gone)], color=style["color"], marker="X", markersize=10, linestyle="", zorder=4)
    return law.bytes(gone)


def draw_errors(result: Result) -> Figure:
    """Each backend's errors as multiples of eager's in the same dtype: 1 is as good as eager, less is better."""
    panels = list(dict.fromkeys(error.panel for error in result.errors))
    backends = [b for b in dict.fromkeys(error.backend for error in result.errors) if b != "eager"]
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    width, height = max(7.5, 3.4 * columns + 1.0), (1.9 + 0.3 * len(backends)) * rows + 0.6
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        of_panel = [error for error in result.errors if error.panel == panel]
        eager = eager_error(of_panel)
        for error in of_panel:
            if error.backend == "eager":
                continue
            for offset, name in zip((-0.24, -0.08, 0.08, 0.24), ("output", *GRADIENTS), strict=True):
                value, yardstick = getattr(error, name), getattr(eager, name)
                if value is not None and yardstick:
                    place = backends.index(error.backend) + offset
                    axis.plot(value / yardstick, place, RESULT_MARKERS[name], color=LOOKS[error.backend][0], markersize=6)
        axis.axvline(1, color=LOOKS["eager"][0], linewidth=1.4)
        axis.set_yticks(range(len(backends)), backends)
        axis.set_ylim(len(backends) - 0.4, -0.6)
        axis.set_title(panel.title)
        axis.set_xlabel("error / eager's error")
        for tick in axis.get_yticklabels():
            tick.set_fontweight("bold" if is_rung(tick.get_text()) else "normal")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    axes[0][0].set_xlim(left=0, right=1.05 * max(axes[0][0].get_xlim()[1], 1))  # shared, once every point is drawn
    length = result.config["error_seq_len"]
    what = f"Attention error against float64, in multiples of eager's (rms, sequence length {length:,})"
    figure.suptitle(caption(result, what), fontsize=12)
    handles = [Line2D([], [], marker=m, linestyle="", color="#555555", label=name) for name, m in RESULT_MARKERS.items()]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.35 / height, 1, 1))
    return figure
