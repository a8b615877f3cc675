"""flash_ladder.training.result and log: what a run leaves behind, whichever way it ends."""

import json
import logging
import os
import signal
from dataclasses import replace

import pytest
import torch

from flash_ladder.errors import UserError
from flash_ladder.training.log import SAID, run_log, say, warn
from flash_ladder.training.module import GPTModule, NotFinite
from flash_ladder.training.result import OutOfMemory, is_out_of_memory
from flash_ladder.training.run import train
from tests.helpers.tiny import tiny_config, values


def result(run):
    return json.loads((run / "result.json").read_text())


def broken_step(monkeypatch, error):
    """Makes the third batch raise `error`."""
    step = GPTModule.training_step

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise error
        return step(self, batch, batch_idx)

    monkeypatch.setattr(GPTModule, "training_step", training_step)


def test_a_finished_run_leaves_its_report_as_data(tmp_path):
    cfg = tiny_config(tmp_path)
    loss = train(cfg, tmp_path / "run")
    found = result(tmp_path / "run")
    assert (found["status"], found["error"], found["step"], found["max_steps"]) == ("finished", None, 6, 6)
    assert found["setting"] | {"n_params": 0} == {
        "backend": "sdpa", "seq_len": 16, "batch_size": 2, "accumulate": 1, "n_devices": 1, "n_nodes": 1, "strategy": "auto",
        "precision": "32", "compile": False, "n_params": 0, "tokens_per_step": 32, "gpu": None, "context_parallel": 1,
    }  # fmt: skip
    came_to = found["metrics"]
    assert came_to["val/loss"] == loss == values(tmp_path / "run", "val/loss")[6]
    assert came_to["val/best_loss"] == min(values(tmp_path / "run", "val/loss").values())
    assert came_to["memory/attention_gib"] > 0 and came_to["speed/tokens_per_second"] > 0
    assert found["sample"].startswith("def ") and 0 < found["seconds"] < 60


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("a kernel\nbroke"), "failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (NotFinite("the training loss is nan"), "not_finite"),
        (KeyboardInterrupt(), "stopped"),
    ],
)
def test_however_a_run_ends_its_result_says_so(tmp_path, monkeypatch, error, status):
    broken_step(monkeypatch, error)
    expected = OutOfMemory if status == "out_of_memory" else type(error)
    with pytest.raises(expected):
        train(tiny_config(tmp_path), tmp_path / "run")
    found = result(tmp_path / "run")
    assert (found["status"], found["step"], found["sample"]) == (status, 2, None)
    assert found["metrics"]["train/loss"] == values(tmp_path / "run", "train/loss")[2]
    if status == "failed":
        assert found["error"] == "a kernel"
    if status == "out_of_memory":
        assert "ran out of memory at step 3 with attention=sdpa, data.seq_len=16, data.batch_size=2" in found["error"]


def test_a_run_that_a_signal_stopped_and_one_that_went_on(tmp_path, monkeypatch):
    step = GPTModule.training_step

    def interrupt(self, batch, batch_idx):
        if batch_idx == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(GPTModule, "training_step", interrupt)
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        train(tiny_config(tmp_path), run)
    assert result(run)["status"] == "stopped" and result(run)["error"] == "stopped by SIGTERM after step 4"
    monkeypatch.undo()
    train(replace(tiny_config(tmp_path), resume=str(run)), run)
    assert (result(run)["status"], result(run)["step"]) == ("finished", 6)
    log = (run / "train.log").read_text()
    assert "stopped by SIGTERM" in log and "resuming after step 4" in log and log.count("attention: sdpa") == 2


def test_a_full_disk_is_no_lack_of_memory():
    assert not is_out_of_memory(OSError(28, "No space left on device"))
    assert not is_out_of_memory(UserError("out of memory"))


# ---- a folder that holds a run ----


def test_a_run_leaves_another_runs_folder_alone(tmp_path):
    run = tmp_path / "run"
    train(tiny_config(tmp_path, max_steps=1, val_every=1), run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"run holds a run already \(config.yaml\); hydra.run.dir=PATH names another folder"):
        train(tiny_config(tmp_path), run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# ---- train.log ----


def test_what_is_said_is_written_from_the_first_line_on(tmp_path, capsys):
    with run_log() as write_to:
        say("before", 1)
        write_to(tmp_path / "train.log")
        say()
        warn("look out")
    say("after")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == ["INFO    before 1", "WARNING look out"]
    assert capsys.readouterr().out == "before 1\n\nafter\n"
    assert not SAID.handlers


def test_a_warning_outside_a_run_is_printed_once(capfd):
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []  # pytest's own would take it
    try:
        warn("look out")
    finally:
        root.handlers = handlers
    assert capfd.readouterr().err == "warning: look out\n"


def test_a_run_that_never_began_leaves_no_log(tmp_path):
    with pytest.raises(UserError), run_log():
        say("hello")
        raise UserError("no")
    assert not list(tmp_path.iterdir())
