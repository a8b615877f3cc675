"""The benchmark's pictures, from figures made up: what is drawn, for whom, and where it ends."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from flash_ladder.benchmark.plots import alike, draw_errors, draw_memory, draw_speed, plot, shown, split
from flash_ladder.benchmark.result import Cell, Panel, read
from flash_ladder.drawing import LOOKS
from tests.helpers.made_up_benchmark import made_up

DOCS = Path(__file__).parents[3] / "docs"
CAUSAL = Panel(True, 64, None)


def lines(axis, backend: str) -> list:
    """The lines of an axis in the backend's colour."""
    return [line for line in axis.lines if to_hex(line.get_color()) == LOOKS[backend][0]]


def labels(axis) -> list[str]:
    """What is written beside an axis and in it."""
    return [text.get_text() for text in axis.texts]


def test_six_files(tmp_path):
    written = plot(made_up(), tmp_path / "a.png")
    assert [path.name for path in written] == ["a.png", "a.svg", "a_memory.png", "a_memory.svg", "a_error.png", "a_error.svg"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[::2])
    assert all("<svg" in path.read_text() and "flash_v2 (ours)" in path.read_text() for path in written[1::2])


def test_the_same_figures_give_the_same_files(tmp_path):
    for name in ("a.png", "b.png"):
        plot(made_up(), tmp_path / name)
    for end in (".png", ".svg", "_memory.svg", "_error.svg"):
        assert (tmp_path / f"a{end}").read_bytes() == (tmp_path / f"b{end}").read_bytes()


def test_only_what_was_measured_is_drawn(tmp_path):
    result = made_up(errors=[])
    for cell in result.cells:
        cell.forward_tflops = cell.backward_tflops = None
    assert [path.name for path in plot(result, tmp_path / "a.png")] == ["a_memory.png", "a_memory.svg"]


def test_a_backend_that_nobody_gave_a_look_is_drawn_too(tmp_path):
    result = made_up()
    result.cells += [replace(cell, backend="new") for cell in result.cells if cell.backend == "fa2"]
    result.errors += [replace(error, backend="newer") for error in result.errors if error.backend == "fa3"]
    plot(result, tmp_path / "a.png")
    assert "new 200 · 20 %" in labels(draw_speed(result).axes[0])


def test_two_panels_causal_ones_first():
    causal, full, wide = CAUSAL, Panel(False, 64, None), Panel(True, 128, None)
    assert shown([full, causal, wide]) == [causal, wide] and shown([full]) == [full]
    assert shown([causal, wide, Panel(True, 256, None)]) == [causal, wide]


# ---- speed ----


def test_speed():
    figure = draw_speed(made_up())
    forward, backward = figure.axes
    assert forward.get_ylabel() == "forward, TFLOP/s" and backward.get_ylabel() == "backward, TFLOP/s"
    (line,) = lines(forward, "flash_v2")
    assert list(line.get_xdata()) == [1024, 4096] and list(line.get_ydata()) == [400, 400]
    assert list(lines(forward, "fa3")[0].get_ydata()) == [500, 500] and list(lines(backward, "fa3")[0].get_ydata()) == []
    assert line.get_linewidth() > lines(forward, "fa2")[0].get_linewidth()
    assert labels(forward) == ["eager 50.0", "flash_v2 400 · 40 %", "fa2 200 · 20 %", "fa3 500 · 51 %"]
    assert labels(backward) == ["eager 25.0", "flash_v2 200 · 20 %", "fa2 100 · 10 %"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:2] == ["flash_v2 (ours)", "eager (stores N² scores)"]
    assert names[2:] == ["fa2: FlashAttention-2 (PyTorch's)", "fa3: FlashAttention-3 (fa3-fwd), forward alone"]
    assert "NVIDIA H200" in figure.get_suptitle() and "2026-11-23" in figure.get_suptitle() and "torch" in figure.get_suptitle()
    assert "989 TFLOP/s" in figure.get_suptitle() and "other shapes: in the tables" in figure.get_suptitle()


def test_speed_on_an_unknown_gpu_has_no_share():
    figure = draw_speed(made_up(device="A GPU, sm_70"))
    assert "flash_v2 400" in labels(figure.axes[0]) and "%" not in figure.get_suptitle()


def test_the_axis_is_broken_where_some_are_far_slower():
    assert split([5.0, 70.0, 160.0, 800.0]) == [(pytest.approx(136), pytest.approx(832)), (0.0, pytest.approx(87.5))]
    assert split([200.0, 500.0, 800.0]) == [(0.0, pytest.approx(848))]  # 200 is no small share of 800
    assert split([50.0, 90.0, 160.0, 300.0, 550.0, 800.0]) == [(0.0, pytest.approx(848))]  # nowhere a gap
    assert split([7.0]) == [(0.0, pytest.approx(7.42))]


def test_a_broken_axis_shows_every_line_with_its_figure():
    result = made_up()
    for cell in result.cells:
        if cell.backend == "eager" and cell.forward_tflops:
            cell.forward_tflops, cell.backward_tflops = 12.0, 9.0
    upper, lower, *_ = draw_speed(result).axes
    assert lower.get_ylim()[0] == 0 and lower.get_ylim()[1] < upper.get_ylim()[0]
    assert labels(lower) == ["eager 12.0"] and "eager 12.0" not in labels(upper) and "flash_v2 400 · 40 %" in labels(upper)
    assert upper.get_xlim() == lower.get_xlim()


# ---- memory ----


def ends_of_labels(axis: Axes) -> list[float]:
    """Where the labels beside an axis stand, from below."""
    return sorted(text.xyann[1] for text in axis.texts if text.arrow_patch)


def test_memory_and_where_it_ends():
    axis = draw_memory(made_up()).axes[0]
    found = [label for label in labels(axis) if "GPU" not in label]
    assert found == ["eager  $S^{2.00}$\nout of memory: needs 4 GiB", "flash_v2 ≈ fa2\n32 MiB  $S^{1.00}$"]
    measured, dotted, cross = lines(axis, "eager")
    assert list(measured.get_ydata()) == pytest.approx([2**26, 2**30])
    assert list(dotted.get_xdata()) == [4096, 8192] and list(dotted.get_ydata()) == pytest.approx([2**30, 2**32])
    assert list(cross.get_xdata()) == [8192] and cross.get_ydata()[0] == pytest.approx(2**32)
    assert len(lines(axis, "flash_v2")) == 1
    low, high = axis.get_ylim()
    assert low < 2**22 and high > 140 * 2**30


def test_lines_that_lie_on_each_other_are_dashed_in_turns():
    result = made_up()
    assert alike(result, CAUSAL) == [["eager"], ["flash_v2", "fa2"]]
    axis = draw_memory(result).axes[0]
    (rung,), (peer,) = lines(axis, "flash_v2"), lines(axis, "fa2")
    assert rung.is_dashed() and peer.is_dashed() and rung.get_markersize() > peer.get_markersize()
    for cell in result.cells:
        if cell.backend == "fa2":
            cell.peak_gib *= 1.1
    assert alike(result, CAUSAL) == [["eager"], ["flash_v2"], ["fa2"]]
    assert not lines(draw_memory(result).axes[0], "fa2")[0].is_dashed()


def test_labels_do_not_cover_each_other():
    result = read(DOCS / "attention_h200.json")
    for axis in [*draw_memory(result).axes, *draw_speed(result).axes]:
        places = ends_of_labels(axis)
        height = axis.get_position().height * axis.figure.get_figheight() * 72  # points
        n_lines = max(label.count("\n") + 1 for label in labels(axis))
        assert all((above - below) * height >= 13 * n_lines for below, above in pairwise(places))


# ---- errors ----


def test_errors_are_multiples_of_eagers():
    figure = draw_errors(made_up())
    axis = figure.axes[0]
    assert sorted(line.get_xdata()[0] for line in lines(axis, "flash_v2")) == [0.5, 1, 1, 2]
    assert [line.get_xdata()[0] for line in lines(axis, "fa3")] == [2]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["flash_v2 (ours)", "fa3: FlashAttention-3 (fa3-fwd)"]
    assert labels(axis) == ["≤ 2.00", "≤ 2.00 (output)"]
    assert axis.get_xlim()[0] == 0 and axis.get_xlim()[1] > 2


def test_a_file_of_the_first_version(tmp_path):
    written = plot(read(DOCS / "attention_h200.json"), tmp_path / "old.png")
    assert written[0].name == "old.png"


def test_no_eager_and_no_length_twice(tmp_path):
    cells = [Cell("flash_v2", 64, 1024, False, 400.0, 200.0, 0.5)]
    plot(made_up(cells=cells, errors=made_up().errors[1:2]), tmp_path / "a.png")
