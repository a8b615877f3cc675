"""The table of a sweep: as wide as the screen and no wider, and the same rows as CSV and JSON."""

import csv
import json

import pytest

from flash_ladder.sweep.rows import read_sweep
from flash_ladder.sweep.run_files import Row
from flash_ladder.sweep.series import pictures
from flash_ladder.sweep.table import columns, screen_lines, totals, write_csv, write_sweep_json
from tests.helpers.made_up_runs import made_up_sweep, write_run


@pytest.fixture
def sweep(tmp_path):
    return read_sweep(made_up_sweep(tmp_path))


@pytest.mark.parametrize("width", [40, 80, 120, 200, 400])
def test_no_line_is_wider_than_the_screen(sweep, width):
    lines = screen_lines(sweep, width)
    assert max(map(len, lines)) <= width and lines[0].startswith("backend")
    assert len([line for line in lines if line.startswith(("eager", "sdpa", "flash"))]) == 13


def test_what_is_worth_most_stays(sweep):
    narrow, wide = screen_lines(sweep, 80), screen_lines(sweep, 400)
    assert {"backend", "seq_len", "tokens/s", "peak", "status"} <= {*narrow[0].split()} and "time" not in narrow[0].split()
    assert any(line.startswith("left out for the width of 80: ") and "time" in line for line in narrow)
    assert "mJ/token" in wide[0] and not any("left out" in line for line in wide)


def test_a_row_on_the_screen(sweep):
    line = next(line for line in screen_lines(sweep, 400) if line.startswith("flash_v2    4,096"))
    assert line.split()[2:9] == ["4", "1", "300,000", "3.00", "30.0", "%", "3.5"] and "finished" in line


def test_errors_are_told_and_cannot_write_to_the_terminal(tmp_path):
    setting = {"backend": "sdpa", "seq_len": 8}
    write_run(tmp_path / "\x1b[31m", setting=setting, measured={}, status="failed", error="a\nb\tc\x1b[2J" + "x" * 300)
    lines = screen_lines(read_sweep(tmp_path), 100)
    assert not any("\x1b" in line for line in lines) and max(map(len, lines)) <= 100


def test_columns_without_a_value_are_left_out(tmp_path):
    write_run(tmp_path / "0", setting={"backend": "eager", "seq_len": 8}, measured={"val/loss": 2.0}, overrides=["seed=1"])
    write_run(tmp_path / "1", setting={"backend": "eager", "seq_len": 8}, measured={"val/loss": 1.0}, overrides=["seed=2"])
    heads = [column.head for column in columns(read_sweep(tmp_path))]
    assert heads == ["backend", "seq_len", "seed", "val loss", "seconds", "status", "folder"]


def test_csv_and_json_agree(sweep, tmp_path):
    write_csv(sweep, tmp_path / "sweep.csv")
    write_sweep_json(sweep, pictures(sweep), tmp_path / "sweep.json")
    rows, found = list(csv.DictReader((tmp_path / "sweep.csv").open())), json.loads((tmp_path / "sweep.json").read_text())
    assert len(rows) == len(found["rows"]) == 13
    for row, same in zip(rows, found["rows"], strict=True):
        assert all(value == ("" if same[name] is None else str(same[name])) for name, value in row.items())
    exponents = {(g["panel"], g["line"]): round(g["exponent"], 2) for g in found["growth"]}
    assert (
        exponents["one attention layer, one sequence", "eager"] == 2 and exponents["one attention layer, one sequence", "sdpa"] == 1
    )


def test_totals():
    rows = [Row("0", status="failed"), Row("1", status="finished"), Row("2", status="out_of_memory"), Row("3", status="finished")]
    assert totals(rows) == "4 runs: 2 finished, 1 failed, 1 out of memory" and totals(rows[:1]) == "1 run: 1 failed"
