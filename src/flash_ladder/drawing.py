"""How this repository's pictures look: each backend's colour and marker, axes of lengths, and labels that do not cover each other.

Colour-blind readers can tell the colours apart (Okabe and Ito's palette, then Paul Tol's). This repository's
rungs have warm colours, bold lines and filled markers; the peers have cool colours, thin lines and open markers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from flash_ladder.names import is_kernel
from flash_ladder.units import GIB, size

LOOKS = {  # colour, marker
    "eager": ("#000000", "o"),
    "sdpa": ("#7f7f7f", "o"),
    "flash_v1": ("#e69f00", "o"),
    "flash_v2": ("#d55e00", "s"),
    "flash_v3": ("#882255", "D"),
    "fa2": ("#0072b2", "^"),
    "cudnn": ("#009e73", "v"),
    "fa3": ("#56b4e9", "X"),
    "fa4": ("#332288", "P"),
    "flex": ("#44aa99", "<"),
    "flash_attn": ("#6699cc", ">"),
    "efficient": ("#999933", "p"),
    "math": ("#bbbbbb", "h"),
}
SPARE_COLOURS = ("#004488", "#bb5566", "#117733", "#aa4499", "#ddaa33", "#663333")  # for a backend that is not in LOOKS
SPARE_MARKERS = ("*", "d", "8", "H")
# Any: matplotlib types each name as a literal.
STYLE: dict[Any, Any] = {
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 110,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # of like width, for a reader of the SVG without the first font
    "svg.fonttype": "none",  # text stays text: small, and a search finds it
    "svg.hashsalt": "flash-ladder",  # the same figures give the same file
}
LABEL_SIZE = 13  # points
WIDTH = 13.0  # inches of a picture at least, for its caption and its legend
FAINT = "#555555"


def ink(colour: str) -> str:
    """A line's colour, darker, for text that is legible on white."""
    red, green, blue = to_rgb(colour)
    return to_hex((0.72 * red, 0.72 * green, 0.72 * blue))


def looks(backends: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each backend; one that is not in LOOKS gets a spare look, the same in every picture of a result."""
    spare = zip(cycle(SPARE_COLOURS), cycle(SPARE_MARKERS), strict=False)
    return {backend: LOOKS.get(backend) or next(spare) for backend in backends}


def line_style(backend: str, look: tuple[str, str]) -> dict:
    """The style of a backend's line. A rung's is bold, and a peer's thin one goes over it, so that both show where they meet."""
    colour, marker = look
    ours = is_kernel(backend)
    return {
        "color": colour,
        "marker": marker,
        "linewidth": 3.2 if ours else 1.6,
        "markersize": 8,
        "markerfacecolor": colour if ours or backend == "eager" else "white",
        "markeredgewidth": 1.6,
        "linestyle": "--" if backend == "sdpa" else "-",  # sdpa runs one of the others, and would cover that line
        "zorder": 2 if ours else 3,
    }


# ---- figures and axes ----


def figure_with_labels(columns: int, *, labels: float, height: float, bottom: float) -> tuple[Figure, dict[str, float]]:
    """A figure for columns of panels with `labels` inches of room on the right of each, and where in it the panels go.

    height, bottom: inches; the legend is at the bottom.
    """
    left = 1.25
    width = max(WIDTH, columns * (left + 3.6 + labels))
    panel = width / columns - left - labels
    room = {"left": left / width, "right": 1 - labels / width, "top": 1 - 1.15 / height, "bottom": bottom / height}
    return Figure(figsize=(width, height)), room | {"wspace": (left + labels) / panel}


def save(figure: Figure, path: Path) -> list[Path]:
    """Writes a figure to `path` (.png) and beside it as .svg; returns both. Raises OSError where one cannot be written."""
    files = [path, path.with_suffix(".svg")]
    figure.savefig(files[0])
    figure.savefig(files[1], metadata={"Date": None})  # the same figures give the same file
    return files


def set_lengths(axis: Axes, lengths: list[int]) -> None:
    """A logarithmic axis of sequence lengths, "4k" for 4096."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(lengths))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda s, _: length_in_words(s)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("sequence length, tokens")


def length_in_words(seq_len: float) -> str:
    """ "4k" for 4096."""
    return f"{seq_len / 1024:.0f}k" if seq_len >= 1024 and seq_len % 1024 == 0 else f"{seq_len:.0f}"


def bytes_in_words(n_bytes: float) -> str:
    """ "1.02 GiB", and TiB where there are a thousand of those."""
    return size(n_bytes) if n_bytes < 1000 * GIB else f"{n_bytes / 2**40:.2g} TiB"


# ---- labels at the ends of lines ----


@dataclass(frozen=True)
class Label:
    """A text at a point of an axis, in a line's colour."""

    text: str
    x: float
    y: float
    colour: str
    bold: bool = False


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions nearest to the wanted ones that are at least `gap` apart and, where there is room, between `low` and `high`.

    Those too near each other form a block around the mean of their wanted positions (isotonic regression).
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    blocks: list[list[float]] = []  # of each: its wanted positions less the gaps below them
    for rank, index in enumerate(order):
        blocks.append([wanted[index] - rank * gap])
        while len(blocks) > 1 and sum(blocks[-2]) / len(blocks[-2]) > sum(blocks[-1]) / len(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    bases = [sum(block) / len(block) for block in blocks for _ in block]
    highest = max(low, high - (len(wanted) - 1) * gap)
    found = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        found[index] = min(max(bases[rank], low), highest) + rank * gap
    return found


def add_labels(axis: Axes, labels: list[Label], lines_each: int = 1) -> None:
    """Writes labels on the right of an axis, each as near to its point as the others allow; a thin line leads to it.

    The axis has its limits and its place in the figure already. lines_each: lines of text in a label.
    """
    to_fraction = axis.transData + axis.transAxes.inverted()
    points = [to_fraction.transform((label.x, label.y)) for label in labels]
    figure = cast("Figure", axis.figure)  # our pictures have no subfigures
    height = axis.get_position().height * figure.get_figheight()
    gap = LABEL_SIZE * (1.25 if lines_each == 1 else 1.45 * lines_each) / 72 / height
    places = spread([y for _, y in points], gap, gap / 3, 1 - gap / 4)
    for label, place in zip(labels, places, strict=True):
        axis.annotate(
            label.text,
            xy=(label.x, label.y),
            xytext=(1.05, place),
            textcoords="axes fraction",
            va="center",
            fontsize=LABEL_SIZE,
            fontweight="bold" if label.bold else "normal",
            color=label.colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5, "relpos": (0, 0.5)},
        )
