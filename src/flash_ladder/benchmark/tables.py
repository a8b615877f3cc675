"""The attention benchmark's tables, as lines of text."""

from __future__ import annotations

from textwrap import wrap

from flash_ladder.benchmark.result import GIB, GRADIENTS, Cell, Error, Masked, Result, batch_size, mean_speedup
from flash_ladder.measure.growth import growth
from flash_ladder.names import is_kernel
from flash_ladder.units import size

SHAPE, BACKEND, WIDTH = 31, 11, 146  # widths of a table's first columns, and of all of it
NOTE = 38  # columns of a note beside figures; the JSON has longer notes whole


def header(result: Result) -> list[str]:
    """Lines that say where and on what it was measured, and what the table leaves out."""
    cfg = result.config
    versions = [f"{name} {getattr(result, name)}" for name in ("torch", "triton", "cudnn", "driver") if getattr(result, name)]
    lines = [
        "; ".join([result.device, ", ".join(versions), *([result.date] if result.date else [])]),
        f"{cfg['dtype']}, {cfg['tokens']:,} tokens (batch = tokens / S, at least 1), width {cfg['width']:,} (heads = width / D)",
    ]
    if result.left_out:
        lines += wrap("left out: " + ", ".join(f"{name} ({reason})" for name, reason in result.left_out.items()), WIDTH)
    if not result.on_gpu:
        lines.append("no GPU: speed is not measured; Triton rungs run in the interpreter, and memory and error are real")
    if not result.finished and (result.cells or result.masks):
        lines.append("the run was interrupted: this is what it had measured")
    lines += ["", "Memory is the peak of a forward and backward pass above the inputs."]
    if result.on_gpu:
        peak = "no peak known for this GPU" if result.peak is None else f"the GPU's dense peak is {result.peak:,.0f} TFLOP/s"
        lines.append(f"Speed: 4·B·H·S²·D FLOPs, half if causal, 2.5 times that backward; {peak}.")
    return [*lines, ""]


def table_head(result: Result) -> list[str]:
    """The names of the columns."""
    if not result.on_gpu:
        return [f"{'shape':<{SHAPE}}{'backend':<{BACKEND}}{'memory':>10}{'of eager':>11}"]
    over = f"x {result.config['baseline']}"
    one_way = f"{'TFLOP/s':>8}{'of peak':>9}{over:>9}"
    return [
        f"{'':<{SHAPE + BACKEND}}{'forward':>17}{'':>9}{'backward':>19}",
        f"{'shape':<{SHAPE}}{'backend':<{BACKEND}}{one_way}  {one_way}{'memory':>11}",
    ]


def row_lines(row: list[Cell], result: Result) -> list[str]:
    """The lines of one shape, one for each backend."""
    by_name = {cell.backend: cell for cell in row}
    baseline, eager = by_name.get(result.config["baseline"]), by_name.get("eager")
    shape = f"{row[0].panel} S={row[0].seq_len} B={batch_size(result.config['tokens'], row[0].seq_len)}"
    if result.on_gpu and row[0].seq_len not in result.config["seq_len"]:
        return memory_only(row, shape)
    lines = []
    for cell in row:
        line = f"{shape if cell is row[0] else '':<{SHAPE}}{cell.backend:<{BACKEND}}"
        if cell.peak_gib is None and cell.forward_tflops is None:
            lines.append(line + "  " + shorten(cell.note, WIDTH - len(line)))
            continue
        memory = "-" if cell.peak_gib is None else size(cell.peak_gib * GIB)
        if result.on_gpu:
            for figure in ("forward_tflops", "backward_tflops"):
                line += speed_columns(getattr(cell, figure), getattr(baseline, figure, None), result.peak) + "  "
            line = f"{line[:-2]}{memory:>11}"
        else:
            ratio = "-"
            if cell.peak_gib is not None and eager is not None and eager.peak_gib:
                ratio = f"{cell.peak_gib / eager.peak_gib:.3f}"
            line += f"{memory:>10}{ratio:>11}"
        lines.append(f"{line}  {shorten(cell.note, NOTE)}".rstrip())
    return lines


def memory_only(row: list[Cell], shape: str) -> list[str]:
    """A shape without speed, as a sentence."""
    found = (f"{cell.backend} {shorten(cell.note, NOTE) if cell.peak_gib is None else size(cell.peak_gib * GIB)}" for cell in row)
    indent = " " * SHAPE
    return wrap(f"{shape:<{SHAPE}}memory alone: {', '.join(found)}", WIDTH, subsequent_indent=indent)


def speed_columns(tflops: float | None, baseline: float | None, peak: float | None) -> str:
    """TFLOP/s, their share of the GPU's peak, and the multiple of the baseline's."""
    speed = "-" if tflops is None else f"{tflops:.3g}" if tflops < 100 else f"{tflops:.0f}"
    share = "-" if tflops is None or peak is None else f"{100 * tflops / peak:.1f} %"
    return f"{speed:>8}{share:>9}{'-' if not tflops or not baseline else f'{tflops / baseline:.2f}':>9}"


def shorten(note: str, width: int) -> str:
    """A note, cut to the width of its column."""
    return note if len(note) <= width else note[: width - 1] + "…"


def summary(result: Result) -> list[str]:
    """The lines after the grid: growth of memory, errors, means over the shapes, time under masks, host time."""
    sections = (growth_lines(result), error_lines(result), mean_lines(result), mask_lines(result.masks), host_lines(result))
    return [line for lines in sections if lines for line in ("", *lines)]


def growth_lines(result: Result) -> list[str]:
    """Exponent p of memory ~ S^p, a line for each backend and a column for each panel."""
    names = [str(panel) for panel in result.panels]
    lines = [
        "Growth of memory: p of bytes ~ S^p for one sequence (a batch's peak over its batch), fitted to the three longest that fit",
        f"{'backend':<{BACKEND}}" + "".join(f"{name:>{max(len(name) + 2, 22)}}" for name in names),
    ]
    for backend in result.backends:
        line = f"{backend:<{BACKEND}}"
        for panel, name in zip(result.panels, names, strict=True):
            found = growth(result.sequence_bytes(panel, backend))
            text = "-" if found is None else f"{found.exponent:.2f} ({found.lengths[0]} to {found.lengths[-1]})"
            line += f"{text:>{max(len(name) + 2, 22)}}"
        lines.append(line.rstrip())
    return lines if any("to" in line for line in lines[2:]) else []


def error_lines(result: Result) -> list[str]:
    """Errors against float64, and in brackets the multiple of eager's in the same dtype."""
    if not result.errors:
        return []
    results = ("output", *GRADIENTS)
    length = result.config["error_seq_len"]
    lines = [
        f"Error against float64 (rms, relative; one sequence, S={length}), and the multiple of {result.config['dtype']} eager's",
        f"{'shape':<{SHAPE}}{'backend':<{BACKEND}}" + "".join(f"{name:>17}" for name in results),
    ]
    for panel in dict.fromkeys(error.panel for error in result.errors):
        of_panel = [error for error in result.errors if error.panel == panel]
        eager = eager_error(of_panel)
        for number, error in enumerate(of_panel):
            line = f"{str(panel) if number == 0 else '':<{SHAPE}}{error.backend:<{BACKEND}}"
            for name in results:
                value, yardstick = getattr(error, name), getattr(eager, name, None)
                ratio = "" if value is None or not yardstick else f" ({value / yardstick:.2f})"
                line += f"{'-' if value is None else f'{value:.2e}{ratio}':>17}"
            lines.append(f"{line}  {shorten(error.note, NOTE)}".rstrip())
    return lines


def eager_error(errors: list[Error]) -> Error | None:
    """Eager's among the errors of one panel."""
    return next((error for error in errors if error.backend == "eager"), None)


def mean_lines(result: Result) -> list[str]:
    """Each flash rung's speed over every other backend's: geometric means over the shapes that both have."""
    rungs = [backend for backend in result.backends if is_kernel(backend)]
    others = [backend for backend in result.backends if mean_speedup(result, backend, backend, "forward_tflops")]
    if not others or not rungs:
        return []
    lines = [
        "Speed over the others', forward / backward: geometric mean over the shapes that both have",
        f"{'':<{SHAPE - BACKEND}}" + "".join(f"{rung:>17}" for rung in rungs),
    ]
    for other in (name for name in others if rungs != [name]):
        line = f"{'over ' + other:<{SHAPE - BACKEND}}"
        for rung in rungs:
            means = [mean_speedup(result, rung, other, figure) for figure in ("forward_tflops", "backward_tflops")]
            text = " / ".join("-" if mean is None else f"{mean:.2f}" for mean in means)
            line += f"{'' if other == rung else text:>17}"
        lines.append(line.rstrip())
    return lines


def mask_lines(masks: list[Masked]) -> list[str]:
    """Time under a mask in milliseconds, and over the visible area's share of the dense time, mask by mask."""
    if not masks:
        return []
    where = f"causal, one sequence, S={masks[0].seq_len}"
    lines = [
        f"Time under a mask, ms, and over area x time without it: (1.00) where it follows the visible area ({where})",
        f"{'mask':<{SHAPE}}{'backend':<{BACKEND}}{'D':>5}{'area':>9}{'forward':>16}{'backward':>16}",
    ]
    for name in dict.fromkeys(masked.mask for masked in masks):
        of_name = [masked for masked in masks if masked.mask == name]
        for masked in of_name:
            line = f"{name if masked is of_name[0] else '':<{SHAPE}}{masked.backend:<{BACKEND}}{masked.head_dim:>5}"
            line += f"{100 * masked.area:>7.1f} %"
            for milliseconds, ratio in ((masked.forward_ms, masked.forward), (masked.backward_ms, masked.backward)):
                beside = "" if ratio is None else f" ({ratio:.2f})"
                line += f"{'-' if milliseconds is None else f'{milliseconds:.3f}{beside}':>16}"
            lines.append(f"{line}  {shorten(masked.note, WIDTH - len(line) - 2)}".rstrip())
    return lines


def host_lines(result: Result) -> list[str]:
    """Host time of one call."""
    if not result.host_us:
        return []
    told = (f"{backend} {'-' if value is None else f'{value:.0f}'}" for backend, value in result.host_us.items())
    return wrap("Host time of one forward call (B=1, H=1, S=128; median), µs: " + ", ".join(told), WIDTH)
