"""The pictures of a sweep as they are drawn: files, crosses, labels, and looks that tell lines apart."""

import csv
from itertools import combinations

import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text

from flash_ladder.drawing import LOOKS, STYLE
from flash_ladder.sweep.pictures import apart, draw, draw_pictures, line_styles, room_for
from flash_ladder.sweep.rows import read_sweep
from flash_ladder.sweep.series import Line, Panel, Picture, pictures
from tests.helpers.made_up_runs import made_up_sweep


@pytest.fixture
def sweep(tmp_path):
    return read_sweep(made_up_sweep(tmp_path / "runs"))


def test_three_files_each(sweep, tmp_path):
    files = draw_pictures(pictures(sweep), sweep, tmp_path)
    assert list(files) == ["memory", "speed", "speedup", "loss"]
    for name, (png, svg, numbers) in files.items():
        assert png.read_bytes().startswith(b"\x89PNG") and "<svg" in svg.read_text() and png.name == f"sweep_{name}.png"
        assert len(list(csv.DictReader(numbers.open()))) > 5


def test_the_csv_is_what_is_drawn(sweep, tmp_path):
    rows = list(csv.DictReader(draw_pictures(pictures(sweep), sweep, tmp_path)["memory"][2].open()))
    eager = [row for row in rows if row["line"] == "eager" and row["panel"].startswith("one")]
    assert [(row["seq_len"], float(row["value"]), row["exponent"]) for row in eager[:2]] == [
        ("1024", 1024**2 * 64, "2.0000"),
        ("2048", 2048**2 * 64, "2.0000"),
    ]
    assert [row["seq_len"] for row in rows if row["status"] == "out of memory"] == ["8192"]


def test_exponents_and_crosses_are_drawn(sweep):
    peak, layer = draw(pictures(sweep)[0], sweep).axes
    assert [text.get_text() for text in layer.texts] == [
        "eager\n4 GiB  $S^{2.00}$",
        "sdpa\n64 MiB  $S^{1.00}$",
        "flash_v2\n64 MiB  $S^{1.00}$",
    ]
    crosses = [line for line in peak.lines if line.get_marker() == "X"]
    assert [(list(line.get_xdata()), to_hex(line.get_color())) for line in crosses] == [([8192], LOOKS["eager"][0])]
    assert peak.texts[0].get_text().startswith("eager  $S^{0.92}$\nout at 8k, needs ")
    assert not [line for line in layer.lines if line.get_marker() == "X"]


@pytest.mark.parametrize("number", range(4))
def test_labels_cover_neither_each_other_nor_the_edge(sweep, number):
    with rc_context(STYLE):
        figure = draw(pictures(sweep)[number], sweep)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    renderer = canvas.get_renderer()
    for axis in figure.axes:
        boxes = [Text.get_window_extent(text, renderer) for text in axis.texts]  # without the lines that lead to them
        boxes += [axis.yaxis.label.get_window_extent(renderer) for axis in figure.axes]
        assert boxes and not [pair for pair in combinations(boxes, 2) if pair[0].shrunk(1, 0.9).overlaps(pair[1].shrunk(1, 0.9))]
        assert all(box.x1 <= figure.bbox.x1 for box in boxes)


def test_one_point(tmp_path):
    sweep = read_sweep(made_up_sweep(tmp_path / "runs", backends=("flash_v2",), lengths=(2048,)))
    for picture in pictures(sweep):
        for axis in draw(picture, sweep).axes:
            assert len(axis.texts) == 1 and axis.get_ylim()[0] < axis.get_ylim()[1]


def test_forty_lines_have_the_labels_that_fit(sweep):
    lines = [Line("flash_v2", f"lr={n}", {1.0: 4.0 + n, 2.0: 3.0 + n}) for n in range(40)]
    figure = draw(Picture("loss", "Loss", [Panel("training", "step", "loss", "nats", lines)]), sweep)
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert 8 <= len(labels) <= 40 and len(figure.axes[0].lines) == 40
    assert labels[0].startswith("lr=0 ") and labels[-1].startswith("lr=39 ")
    assert "lines without a label: in the CSV" in figure.get_suptitle()


def test_lines_look_different():
    one = line_styles([Line("flash_v2", f"n={n}", {}) for n in range(6)])
    assert len({style["color"] for style in one.values()}) == 6
    two = line_styles([Line(backend, f"n={n}", {}) for backend in ("eager", "flash_v2") for n in range(3)])
    assert {style["color"] for style in two.values()} == {LOOKS["eager"][0], LOOKS["flash_v2"][0]}
    assert len({(style["color"], style["linestyle"]) for style in two.values()}) == 6


def test_marks_of_an_axis_are_apart():
    lengths = [1024.0 * 2**k for k in range(9)]
    assert apart(lengths) == lengths[::2] and apart(lengths[:4]) == lengths[:4] and apart([7.0]) == [7.0]


def test_room_for_labels():
    assert room_for([]) > 15
