"""The certificate's picture, from figures made up: what it shows, and that odd figures do not stop it."""

import math
from dataclasses import replace

from matplotlib.figure import Figure

from flash_ladder.certify.certificate import Certificate, Parting, Run
from flash_ladder.certify.picture import NOTHING, draw_certificate, draw_checks, draw_errors
from flash_ladder.export.parity import Check, kl_limit

EAGER = Run(2.0, 1e-6, 1e-2, 1e-3, 1.0, 1.0, (1e-6, 3e-6), [1e-6, 1e-6])
OURS = replace(EAGER, kl_by_position=[2e-6, 1e-6])
MADE_UP = Certificate(
    a="flash_v2",
    b="eager",
    n_windows=4,
    seq_len=2,
    exact_loss=2.0,
    runs={"flash_v2": OURS, "eager": EAGER},
    mean_kl=1e-6,
    max_logit_difference=1e-2,
    greedy_agreement=1.0,
    noise=0.0,
    rounding=1e-6,
    clear_share=1.0,
    positions=[1.0, 2.0],
    parting=Parting(9, None, 0.0),
)


def test_every_line_and_the_limit_are_drawn():
    axis = Figure().subplots()
    draw_errors(axis, MADE_UP)
    drawn = [list(line.get_ydata()) for line in axis.lines]
    assert drawn == [[1e-6, 1e-6], [2e-6, 1e-6], [kl_limit(1e-6, floor=0)] * 2]
    assert [text.get_text() for text in axis.texts] == ["eager", "flash_v2", "limit on the mean"]


def test_every_check_is_drawn_as_a_share_of_its_limit():
    axis = Figure().subplots()
    checks = [
        Check("a: x", 2.0, 4.0),
        Check("a: y", 0.0, 4.0),
        Check("a: z", 0.996, 0.999, is_share=True),
        Check("a: nan", math.nan, 1.0),
    ]
    draw_checks(axis, checks)
    marks = [line for line in axis.lines if line.get_marker() != "None"]
    assert [round(line.get_xdata()[0], 9) for line in marks] == [0.5, NOTHING, 4.0, 1e12]
    assert [line.get_marker() for line in marks] == ["o", "o", "X", "X"]


def test_it_is_written_twice_whatever_the_figures(tmp_path):
    broken = replace(OURS, mean_kl=math.nan, worst_stretch=(math.nan, 3e-6), kl_by_position=[math.nan, math.nan])
    for found in (MADE_UP, replace(MADE_UP, runs={"flash_v2": broken, "eager": EAGER}), replace(MADE_UP, rounding=0.0)):
        draw_certificate(found, "made up", tmp_path / "certificate.png")
        svg = (tmp_path / "certificate.svg").read_text()
        assert ("NOT certified" in svg) == (found is not MADE_UP) and "made up" in svg
        assert (tmp_path / "certificate.png").stat().st_size > 10_000
        (tmp_path / "certificate.png").unlink()
