"""The certificate's picture: each implementation's error over the position in a window, and every figure over its limit."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes

from flash_ladder.certify.causal_lm import TRUSTED
from flash_ladder.certify.certificate import Certificate
from flash_ladder.drawing import FAINT, LABEL_SIZE, LOOKS, SPARE_COLOURS, STYLE, Label, add_labels, figure_with_labels, ink, save
from flash_ladder.export.parity import Check, kl_limit

HEIGHT = 6.2  # inches
NOTHING = 1e-4  # of a limit: where a figure lies that is less
GOOD, BAD = "#117733", "#cc3311"


def draw_certificate(certificate: Certificate, title: str, path: Path) -> None:
    """Writes the picture to `path` (.png) and beside it as .svg. Raises OSError where one cannot be written."""
    with rc_context(STYLE):
        figure, room = figure_with_labels(2, labels=3.6, height=HEIGHT, bottom=0.95)
        errors, figures = figure.subplots(1, 2, gridspec_kw=room)
        draw_errors(errors, certificate)
        draw_checks(figures, certificate.checks())
        words = "certified" if certificate.within else "NOT certified"
        figure.suptitle(f"{certificate.a} against {certificate.b}: {words}\n{title}", x=0.02, ha="left", fontsize=14)
        save(figure, path)


def draw_errors(axis: Axes, certificate: Certificate) -> None:
    """The mean KL from float64 to each implementation over the position, and the limit on the mean over all positions."""
    spare, labels = iter(SPARE_COLOURS), []
    axis.set_yscale("log")
    axis.set_title("KL divergence from float64", loc="left", fontweight="bold")
    axis.set_ylabel("nats per token")
    axis.set_xlabel("position in the window")
    # Eager is drawn wide and first: whatever rounds alike lies on it.
    for label in sorted(certificate.runs, key=lambda label: label != TRUSTED):
        found = certificate.runs[label].kl_by_position
        colour = LOOKS[label][0] if label in LOOKS else next(spare)
        axis.plot(certificate.positions, found, color=colour, linewidth=3.6 if label == TRUSTED else 1.6)
        labels.append(Label(label, certificate.positions[-1], found[-1], ink(colour), label != TRUSTED))
    limit = kl_limit(certificate.rounding, floor=0)
    if limit > 0:
        axis.axhline(limit, color=FAINT, linewidth=1.4, linestyle=":")
        labels.append(Label("limit on the mean", certificate.positions[-1], limit, FAINT))
    add_labels(axis, [label for label in labels if label.y > 0])  # a log axis has no place for others, nan among them


def draw_checks(axis: Axes, checks: list[Check]) -> None:
    """How far each figure is below its limit, or beyond it."""
    axis.set_xscale("log")
    axis.set_title("figure / its limit", loc="left", fontweight="bold")
    shares = [min(max(check.share_of_limit, NOTHING), 1e12) for check in checks]
    axis.axvline(1, color="#000000", linewidth=1.6)
    axis.set_xlim(NOTHING / 1.5, 3 * max(1.0, *shares))
    axis.set_ylim(len(checks) - 0.4, -0.6)
    axis.set_yticks([])
    axis.grid(False, axis="y")
    for row, (check, share) in enumerate(zip(checks, shares, strict=True)):
        colour = GOOD if check.within else BAD
        axis.plot([NOTHING / 1.5, share], [row, row], color=colour, linewidth=2)
        axis.plot([share], [row], "o" if check.within else "X", color=colour, markersize=9)
        text = check.name.replace(": ", "\n", 1)
        axis.annotate(
            text, (1.04, row), xycoords=("axes fraction", "data"), va="center", fontsize=LABEL_SIZE - 1, color=ink(colour)
        )
