"""flash_ladder.training.extras and profiler: what a user adds to Lightning's trainer."""

import gzip
import json
from dataclasses import replace

import pytest
from lightning.pytorch.callbacks import EarlyStopping

from flash_ladder.errors import UserError
from flash_ladder.schema import TrainerConfig
from flash_ladder.training.extras import extra_arguments, extra_callbacks
from flash_ladder.training.run import train
from tests.helpers.tiny import tiny_config, values


def run_with(tmp_path, further, **trainer):
    train(tiny_config(tmp_path, lightning=further, **trainer), tmp_path / "run")
    return tmp_path / "run"


def test_fast_dev_run_takes_one_step_and_keeps_nothing(tmp_path, capsys):
    run = run_with(tmp_path, {"fast_dev_run": True})
    assert json.loads((run / "result.json").read_text())["step"] == 1
    assert not (run / "checkpoints").exists()
    assert "validation   loss" in capsys.readouterr().out


def test_a_time_limit_ends_a_run_with_a_validation_and_a_checkpoint(tmp_path):
    run = run_with(tmp_path, {"max_time": "00:00:00:01"}, max_steps=10**6, val_every=10**6, log_every=50)
    step = json.loads((run / "result.json").read_text())["step"]
    assert 0 < step < 10**6 and list(values(run, "val/loss")) == [step]
    assert (run / "checkpoints" / "last.ckpt").is_file()


def test_a_profiler_of_lightnings_writes_into_the_run(tmp_path):
    run = run_with(tmp_path, {"profiler": "simple"})
    assert "run_training_batch" in (run / "fit-profiler.txt").read_text()


@pytest.mark.parametrize(
    ("further", "says"),
    [
        ({"limit_train_batch": 4}, r"no such argument; did you mean limit_train_batches\?"),
        ({"profiler": "fast"}, "profiler=fast is not a choice"),
        ({"detect_anomaly": "maybe"}, "detect_anomaly=maybe must be bool"),
        ({"fast_dev_run": -1}, "Lightning refuses it"),
    ],
)
def test_what_lightning_does_not_take_costs_one_line(tmp_path, further, says):
    with pytest.raises(UserError, match=says):
        run_with(tmp_path, further)


def test_what_the_recipe_sets_is_refused_with_its_key():
    with pytest.raises(UserError, match=r"trainer\.lightning\.max_steps: trainer\.max_steps sets that here"):
        TrainerConfig(lightning={"max_steps": 3}).validate()


def test_callbacks_come_by_target(tmp_path):
    about = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss", "patience": 1}
    cfg = replace(tiny_config(tmp_path, max_steps=40, val_every=1), callbacks={"stop": about, "none": None})
    (made,) = extra_callbacks(cfg, tmp_path)
    assert isinstance(made, EarlyStopping) and made.patience == 1
    train(replace(cfg, optimizer=replace(cfg.optimizer, lr=0.0)), tmp_path / "run")
    assert list(values(tmp_path / "run", "val/loss")) == [1, 2]  # it did not fall


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"patience": 3}, r"callbacks\.mine names no class"),
        ({"_target_": "nowhere.At.All"}, "nowhere.At.All cannot be made"),
        ({"_target_": "torch.nn.Identity"}, "is not a lightning.pytorch.Callback"),
    ],
)
def test_a_callback_that_cannot_be_made_costs_one_line(tmp_path, about, says):
    with pytest.raises(UserError, match=says):
        extra_callbacks(replace(tiny_config(tmp_path), callbacks={"mine": about}), tmp_path)


@pytest.mark.parametrize("max_steps", [2, 8])
def test_a_profile_is_a_trace_and_a_table(tmp_path, max_steps, capsys):
    run = run_with(tmp_path, {}, profile=True, max_steps=max_steps, val_every=8)
    trace = json.loads(gzip.decompress((run / "profile" / "trace.json.gz").read_bytes()))
    steps = [event for event in trace["traceEvents"] if event.get("name", "").startswith("Optimizer.step#")]
    assert len(steps) == min(3, max_steps)
    assert "aten::mm" in (run / "profile" / "kernels.txt").read_text()
    assert "profile      " in capsys.readouterr().out


def test_extra_arguments_leave_the_configuration_as_it_was(tmp_path):
    further = {"profiler": "simple", "inference_mode": False}
    assert set(extra_arguments(further, tmp_path)) == set(further) and further["profiler"] == "simple"
