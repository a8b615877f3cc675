"""The report as a whole: what it prints, what it writes, and what it says where it cannot."""

import shutil
from pathlib import Path

import pytest

from flash_ladder.errors import UserError
from flash_ladder.sweep.report import report
from tests.helpers.made_up_runs import made_up_sweep

EARLIER = Path(__file__).parents[1] / "earlier_run" / "run"


def test_it_prints_and_returns_its_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    made_up_sweep(tmp_path)
    before = {*tmp_path.iterdir()}
    written = report(tmp_path)
    assert {*tmp_path.iterdir()} - before == {*written} and len(written) == 3 + 4 * 3
    said = capsys.readouterr()
    assert "13 runs: 11 finished, 1 out of memory, 1 failed" in said.out and said.err == ""
    assert max(len(line) for line in said.out.splitlines() if not line.startswith("report:")) <= 90
    assert said.out.splitlines()[-1].startswith(f"report: {tmp_path / 'report.html'}, and beside it ")


def test_a_second_report_replaces_the_first(tmp_path):
    made_up_sweep(tmp_path)
    first = {path: path.read_bytes() for path in report(tmp_path)}
    assert {path: path.read_bytes() for path in report(tmp_path)} == first


def test_an_earlier_run_alone(tmp_path, capsys):
    shutil.copytree(EARLIER, tmp_path / "run")
    written = report(tmp_path / "run", tmp_path / "out")
    assert {path.parent for path in written} == {tmp_path / "out"}
    assert "1 run: 1 finished" in capsys.readouterr().out


def test_damage_is_a_warning(tmp_path, capsys):
    made_up_sweep(tmp_path)
    (tmp_path / "3" / "result.json").write_text("not JSON")
    report(tmp_path)
    assert capsys.readouterr().err == f"warning: {tmp_path / '3' / 'result.json'} is left out: it is damaged\n"


def test_a_place_that_cannot_be_written(tmp_path):
    made_up_sweep(tmp_path / "runs")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the report's folder .*set out=PATH"):
        report(tmp_path / "runs", tmp_path / "file")
    (tmp_path / "out" / "sweep.csv").mkdir(parents=True)
    with pytest.raises(UserError, match=r"sweep\.csv cannot be written"):
        report(tmp_path / "runs", tmp_path / "out")
