"""flash_ladder.training.loggers: CSV and TensorBoard beside metrics.jsonl, under the same names and steps."""

import csv
import json
import shutil
from importlib.util import find_spec

import pytest
import torch

from flash_ladder import schema
from flash_ladder.errors import UserError
from flash_ladder.kernels import Choice
from flash_ladder.machine.decide import Place
from flash_ladder.measure.probe import Layer, Probe
from flash_ladder.schema import LoggerConfig
from flash_ladder.training.loggers import check_loggers, close_loggers, how_to_look, log_probe, log_sample, open_loggers
from flash_ladder.training.record import MetricsFile
from flash_ladder.training.run import as_run

CPU = torch.device("cpu")
PROBE = Probe(Layer(8, 4, 2, 128, 32, torch.float32, CPU), "sdpa", 2**20, 0.5, 2**22, 1.0, False)


def logged(kind, run_dir, step=0):
    """The loggers of a short run, closed, and where they say to look."""
    cfg = LoggerConfig(kind=kind)
    check_loggers(cfg)
    run_dir.mkdir(exist_ok=True)
    loggers = [MetricsFile(run_dir / "metrics.jsonl"), *open_loggers(cfg, run_dir, {"seed": 1}, step)]
    log_probe(loggers, PROBE, 0)
    for logger in loggers:
        logger.log_metrics({"train/loss": 2.5}, step=10)
        logger.log_metrics({"val/loss": 2.25}, step=20)
    log_sample(loggers, "def ", "def f()", 20)
    look = how_to_look(loggers)
    close_loggers(loggers, failed=False)
    return look


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_none_leaves_metrics_jsonl_alone(tmp_path):
    assert logged("none", tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert [line["step"] for line in lines(tmp_path)] == [0, 10, 20]


def test_csv_has_the_same_names_and_steps_and_a_version_a_start(tmp_path):
    for version in (0, 1):
        look = logged("csv", tmp_path)
        assert look == f"{tmp_path}/csv/version_{version}/metrics.csv"
        with open(look, newline="") as file:
            rows = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
        written = [{name: value for name, value in line.items() if name != "time"} for line in lines(tmp_path)[-3:]]
        assert rows == [pytest.approx(line) for line in written]
    assert "seed: 1" in (tmp_path / "csv" / "version_0" / "hparams.yaml").read_text()


def test_csv_of_a_resumed_run_has_every_step_once(tmp_path):
    logged("csv", tmp_path)
    logged("csv", tmp_path, step=10)
    first, second = (tmp_path / "csv" / f"version_{n}" / "metrics.csv" for n in (0, 1))
    with first.open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "10"]
    with second.open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "10", "20"]  # this run logs them all again


def test_a_logger_that_cannot_write_does_not_end_a_run(tmp_path, capsys):
    [logger] = open_loggers(LoggerConfig(kind="csv"), tmp_path, {})
    logger.log_metrics({"train/loss": 2.5}, step=1)
    shutil.rmtree(tmp_path / "csv")
    for step in (2, 3):
        logger.log_metrics({"train/loss": 2.5}, step=step)
    close_loggers([logger], failed=False)
    said = capsys.readouterr().err
    assert said == f"warning: {tmp_path}/csv/version_0 cannot be written (No such file or directory); metrics.jsonl goes on\n"
    with pytest.raises(UserError, match=r"logger=csv: .* cannot be written"):
        (tmp_path / "csv").touch()
        open_loggers(LoggerConfig(kind="csv"), tmp_path, {"a": 1})


@pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_of_a_resumed_run_has_every_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged("tensorboard", tmp_path)
    close_loggers(open_loggers(LoggerConfig(kind="tensorboard"), tmp_path, {}, step=10), failed=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] and [event.step for event in events.Scalars("train/loss")] == [10]
    assert "val/loss" not in events.Tags()["scalars"] or not events.Scalars("val/loss")


@pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_has_the_same_names_and_steps(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert logged("tensorboard", tmp_path) == f"tensorboard --logdir {tmp_path}/tensorboard"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {name for line in lines(tmp_path) for name in line} - {"step", "time"} == set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("val/loss")] == [(20, 2.25)]


def test_without_the_package_tensorboard_is_one_line(monkeypatch):
    monkeypatch.setattr(schema, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        LoggerConfig(kind="tensorboard").validate()
    for kind in ("wandb", "csv", "none"):
        LoggerConfig(kind=kind).validate()


def test_a_logger_that_is_none_of_these_is_refused():
    with pytest.raises(UserError, match=r"logger\.kind=mlflow is not a choice"):
        LoggerConfig(kind="mlflow").validate()


def test_loggers_see_what_auto_came_to():
    config = {"attention": {"backend": "auto"}, "trainer": {"precision": "auto", "devices": -1, "max_steps": 3}, "seed": 1}
    shown = as_run(config, Place(CPU, 2, "bf16-mixed", "asked for", Choice("flash_v2", "an A100")))
    assert shown["attention"] == {"backend": "flash_v2", "reason": "an A100", "asked": "auto"}
    assert shown["trainer"] == {"precision": "bf16-mixed", "devices": 2, "max_steps": 3} and shown["seed"] == 1
    assert config["attention"] == {"backend": "auto"}
