"""The report of the runs below a folder: a table on the screen, and the same as CSV, JSON, pictures and one HTML page."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from flash_ladder.errors import UserError
from flash_ladder.files import make_writable
from flash_ladder.sweep.page import write_page
from flash_ladder.sweep.rows import Sweep, read_sweep
from flash_ladder.sweep.series import Picture, pictures
from flash_ladder.sweep.table import screen_lines, totals, write_csv, write_sweep_json

NO_TERMINAL = (160, 24)  # columns and lines, where the output is no terminal


def report(folder: Path, out: Path | None = None, baseline: str | None = None) -> list[Path]:
    """Prints the table of the runs below `folder`; writes sweep.csv, sweep.json, report.html and the pictures; returns these files.

    out: where they go; None: `folder`. baseline: the backend that speed-ups are over; None: eager, or sdpa where eager has none.
    Raises UserError where there is no run, none of the baseline, or no room for the files.
    """
    sweep = read_sweep(folder, baseline)
    for warning in sweep.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print("\n".join(screen_lines(sweep, shutil.get_terminal_size(NO_TERMINAL).columns)))
    print(totals(sweep.rows))
    out = folder if out is None else out
    make_writable(out, "the report's folder", "out")
    drawn = pictures(sweep)
    try:
        write_csv(sweep, out / "sweep.csv")
        write_sweep_json(sweep, drawn, out / "sweep.json")
        files = draw_all(drawn, sweep, out)
        title = f"Flash Ladder: {sweep.folder.resolve().name}, {totals(sweep.rows).partition(':')[0]}"
        write_page(sweep, drawn, files, out / "report.html", title)
    except OSError as error:
        raise UserError(f"{error.filename or out} cannot be written ({error.strerror}); set out=FOLDER") from None
    written = [out / "sweep.csv", out / "sweep.json", *(file for group in files.values() for file in group), out / "report.html"]
    n_pictures = f"{len(files)} picture{'s' * (len(files) != 1)}"
    print(f"report: {out / 'report.html'}, and beside it sweep.csv, sweep.json and {n_pictures} (PNG, SVG, CSV)")
    return written


def draw_all(drawn: list[Picture], sweep: Sweep, out: Path) -> dict[str, list[Path]]:
    """The pictures' files, by name; matplotlib is imported once there is something to draw."""
    if not drawn:
        return {}
    from flash_ladder.sweep.pictures import draw_pictures

    return draw_pictures(drawn, sweep, out)
