"""The benchmark's pictures, from figures made up: what is drawn, for whom, and where it ends."""

from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from flash_ladder.benchmark.peers import PEERS
from flash_ladder.benchmark.plots import LOOKS, draw_errors, draw_memory, draw_speed, plot
from flash_ladder.kernels import BACKENDS
from tests.helpers.made_up_benchmark import made_up


def lines(axis, backend: str) -> list:
    """The lines of an axis in the backend's colour."""
    return [line for line in axis.lines if to_hex(line.get_color()) == LOOKS[backend][0]]


def test_every_backend_has_its_own_look():
    assert {*BACKENDS, *PEERS} <= LOOKS.keys()
    assert len({colour for colour, _ in LOOKS.values()}) == len(LOOKS)


def test_three_pictures(tmp_path):
    written = plot(made_up(), tmp_path / "a.png")
    assert [path.name for path in written] == ["a.png", "a_memory.png", "a_error.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_only_what_was_measured_is_drawn(tmp_path):
    result = made_up(errors=[])
    for cell in result.cells:
        cell.forward_tflops = cell.backward_tflops = None
    assert [path.name for path in plot(result, tmp_path / "a.png")] == ["a_memory.png"]


def test_speed():
    figure = draw_speed(made_up())
    forward, backward = figure.axes[0], figure.axes[2]
    assert forward.get_ylabel() == "forward, TFLOP/s" and backward.get_ylabel() == "backward, TFLOP/s"
    (line,) = lines(forward, "flash_v2")
    assert list(line.get_xdata()) == [1024, 4096] and list(line.get_ydata()) == [400, 400]
    assert list(lines(forward, "fa3")[0].get_ydata()) == [500, 500] and list(lines(backward, "fa3")[0].get_ydata()) == []
    assert line.get_linewidth() > lines(forward, "fa2")[0].get_linewidth()
    (right,) = figure.axes[1].child_axes
    assert right.get_ylabel() == "% of the GPU's peak"
    figure.canvas.draw()
    assert right.get_ylim()[1] == pytest.approx(forward.get_ylim()[1] / 9.89, rel=1e-3)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["eager", "flash_v2", "fa2", "fa3"]
    assert "NVIDIA H200" in figure.get_suptitle() and "2026-11-23" in figure.get_suptitle() and "torch" in figure.get_suptitle()


def test_speed_on_an_unknown_gpu_has_no_share():
    assert not draw_speed(made_up(device="A GPU, sm_70")).axes[1].child_axes


def test_memory_and_where_it_ends():
    axis = draw_memory(made_up()).axes[0]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["eager  $S^{2.00}$", "flash_v2  $S^{1.00}$", "fa2  $S^{1.00}$", "out of memory"]
    measured, dotted, cross = lines(axis, "eager")
    assert list(measured.get_ydata()) == pytest.approx([2**26, 2**30])
    assert list(dotted.get_xdata()) == [4096, 8192] and list(dotted.get_ydata()) == pytest.approx([2**30, 2**32])
    assert list(cross.get_xdata()) == [8192] and cross.get_ydata()[0] == pytest.approx(2**32)
    assert len(lines(axis, "flash_v2")) == 1
    low, high = axis.get_ylim()
    assert low < 2**22 and high > 140 * 2**30


def test_errors_are_multiples_of_eagers():
    figure = draw_errors(made_up())
    axis = figure.axes[0]
    assert sorted(line.get_xdata()[0] for line in lines(axis, "flash_v2")) == [0.5, 1, 1, 2]
    assert [line.get_xdata()[0] for line in lines(axis, "fa3")] == [2]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["flash_v2", "fa3"]
    assert axis.get_xlim()[0] == 0 and axis.get_xlim()[1] > 2


def test_a_file_of_the_first_version(tmp_path):
    from flash_ladder.benchmark.result import read

    written = plot(read(Path(__file__).parents[3] / "docs" / "attention_h200.json"), tmp_path / "old.png")
    assert written[0].name == "old.png"
