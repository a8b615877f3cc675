"""flash_ladder.sweep.to_wandb: a sweep's report is a run of its own in the group of its points."""

import os

import pytest
import wandb
from matplotlib.figure import Figure

from flash_ladder.schema import LoggerConfig
from flash_ladder.sweep.to_wandb import log_sweep, read_table
from flash_ladder.training.wandb_copy import open_wandb, recorded_run
from tests.helpers.wandb_file import WandbFile, segments


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield
    wandb.teardown()


def sweep(folder, groups):
    """A folder with a point for each group, a table and a picture, which are returned."""
    for number, group in enumerate(groups):
        open_wandb(LoggerConfig(mode="offline", project="p", group=group), folder / str(number), {}).close()
    (folder / "sweep.csv").write_text("backend,seq_len,loss,status\neager,64,,out_of_memory\nsdpa,64,2.5,finished\n")
    Figure(figsize=(1, 1)).savefig(folder / "sweep_memory.png")
    return [folder / "sweep.csv", folder / "sweep_memory.png", folder / "sweep_memory.svg"]


def test_table_and_pictures_are_in_a_run_of_the_points_group(tmp_path, capsys):
    files = sweep(tmp_path, ["2026-11-30/04-00-00"] * 2)
    log_sweep(tmp_path, files)
    wandb.teardown()
    file = WandbFile(segments(tmp_path)[0])
    assert (file.run.job_type, file.run.run_group, file.run.project) == ("report", "2026-11-30/04-00-00", "p")
    assert file.table("sweep/points") == [
        {"backend": "eager", "seq_len": 64, "loss": None, "status": "out_of_memory"},
        {"backend": "sdpa", "seq_len": 64, "loss": 2.5, "status": "finished"},
    ]
    assert file.summary["sweep/pictures/memory"]["_type"] == "image-file"
    assert (file.folder / "files" / file.summary["sweep/pictures/memory"]["path"]).is_file()
    assert file.run.run_id == recorded_run(tmp_path)["id"] and "wandb sync" in capsys.readouterr().out


@pytest.mark.parametrize("groups", [[], [None], ["a", "b"]])
def test_runs_that_are_no_sweep_log_no_report(tmp_path, groups):
    log_sweep(tmp_path, sweep(tmp_path, groups))
    assert not (tmp_path / "wandb").exists()


def test_wandb_mode_is_obeyed(tmp_path, monkeypatch):
    files = sweep(tmp_path, ["a"])
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log_sweep(tmp_path, files)
    assert not (tmp_path / "wandb").exists()


def test_a_column_of_numbers_holds_numbers(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,x\n,2\n")
    assert read_table(tmp_path / "t.csv") == (["a", "b"], [[1.0, "x"], [None, "2"]])
