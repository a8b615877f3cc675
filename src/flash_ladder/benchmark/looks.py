"""What a backend is called in the benchmark's pictures, and their legend."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flash_ladder.benchmark.result import Result
from flash_ladder.drawing import LABEL_SIZE, line_style, looks
from flash_ladder.names import PEERS, is_kernel


def full_name(backend: str, result: Result) -> str:
    """What a backend is and whose: "flash_v3 (ours)", "fa3: FlashAttention-3 (fa3-fwd 0.0.3)"."""
    if is_kernel(backend):
        return f"{backend} (ours)"
    if backend == "eager":
        return "eager (stores N² scores)"
    if backend == "sdpa":
        return "sdpa (what PyTorch picks)"
    if backend not in PEERS:
        return backend
    peer = PEERS[backend]
    package = result.packages.get(backend) or next(iter(peer.packages), None)
    return f"{backend}: {peer.purpose} ({package})" if package else f"{backend}: {peer.purpose}"


def add_legend(figure: Figure, result: Result, notes: dict[str, str], columns: int = 3) -> None:
    """A line under the panels for each backend of `notes`, which says what follows its name; ours first and in bold."""
    by_name = looks(result.backends)
    handles = [
        Line2D([], [], label=full_name(b, result) + note, **line_style(b, by_name[b]))
        for b, note in sorted(notes.items(), key=lambda named: not is_kernel(named[0]))
    ]
    legend = figure.legend(
        handles=handles,
        loc="lower center",
        ncols=min(len(handles), columns),
        frameon=False,
        fontsize=LABEL_SIZE,
        columnspacing=1.8,
    )
    for text in legend.get_texts():
        text.set_fontweight("bold" if "(ours)" in text.get_text() else "normal")
