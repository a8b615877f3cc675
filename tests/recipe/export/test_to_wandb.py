"""flash_ladder.export.to_wandb: export and evaluate log into the run they belong to, and nowhere where it was not asked for."""

import json
import os
import shutil
import time

import pytest
import wandb

from flash_ladder.errors import UserError
from flash_ladder.export.evaluate import evaluate_export
from flash_ladder.export.export import export_run
from flash_ladder.schema import LoggerConfig
from flash_ladder.script_schema import EvaluateConfig, ExportConfig
from flash_ladder.training.wandb_copy import open_wandb
from tests.helpers.made_up import made_up_run
from tests.helpers.wandb_file import WandbFile, segments


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield
    wandb.teardown()


def run_with_wandb(folder):
    """A made-up run that wandb knows."""
    run = made_up_run(folder)
    copy = open_wandb(LoggerConfig(mode="offline", group="g"), run, {"seed": 1})
    copy.close()
    time.sleep(1 - time.time() % 1)  # wandb names a run's folders by the second
    return run, copy.run.id


def evaluated(model, **options):
    time.sleep(1 - time.time() % 1)
    code = evaluate_export(EvaluateConfig(model=str(model), attention="eager", **options))
    wandb.teardown()
    return code


def test_export_and_evaluate_log_into_the_run(tmp_path, capsys):
    run, run_id = run_with_wandb(tmp_path)
    assert export_run(ExportConfig(run=str(run), attention="sdpa")) == 0
    wandb.teardown()
    assert "WANDB_RESUME=allow wandb sync" in capsys.readouterr().out
    file = WandbFile(segments(run)[-1])
    assert (file.run.run_id, file.run.run_group, file.config["seed"]) == (run_id, "g", 1)
    (row,) = file.table("eval/parity")
    assert (row["backend"], row["against"], row["within"]) == ("sdpa", "eager", 1)
    assert row["loss"] == file.summary["eval/loss"] == pytest.approx(file.summary["eval/against_loss"])
    assert file.summary["eval/mean_kl"] < 1e-6 and file.summary["eval/greedy_agreement"] == 1

    assert json.loads((run / "export" / "config.json").read_text())["wandb"]["id"] == run_id
    assert evaluated(run / "export") == 0
    assert len(segments(run)) == 3
    assert WandbFile(segments(run)[-1]).table("eval/parity")[0]["backend"] == "eager"
    assert evaluated(run / "export", wandb="disabled") == 0
    assert evaluated(run / "export", text=str(next((tmp_path / "text").iterdir()))) == 0  # another text is not this metric's
    assert len(segments(run)) == 3


def test_an_export_elsewhere_logs_where_it_is_asked_to(tmp_path):
    run, run_id = run_with_wandb(tmp_path)
    assert export_run(ExportConfig(run=str(run), out=str(tmp_path / "elsewhere" / "out"), wandb="disabled")) == 0
    shutil.rmtree(run)
    (tmp_path / "here").mkdir()
    os.chdir(tmp_path / "here")
    assert evaluated(tmp_path / "elsewhere" / "out") == 0
    assert not list((tmp_path / "here").iterdir())
    assert evaluated(tmp_path / "elsewhere" / "out", wandb="offline") == 0
    assert WandbFile(segments(tmp_path / "here")[0]).run.run_id == run_id


def test_a_run_without_wandb_has_nowhere_to_log(tmp_path):
    run = made_up_run(tmp_path)
    assert export_run(ExportConfig(run=str(run))) == 0
    assert "wandb" not in json.loads((run / "export" / "config.json").read_text())
    assert evaluated(run / "export") == 0 and not (run / "wandb").exists()
    with pytest.raises(UserError, match="had no wandb"):
        evaluated(run / "export", wandb="offline")


def test_figures_of_another_text_are_not_asked_for():
    with pytest.raises(UserError, match="another text"):
        EvaluateConfig(model="m", wandb="online", text="t").validate()
    for config in (ExportConfig(run="r", wandb="on"), EvaluateConfig(model="m", wandb="on")):
        with pytest.raises(UserError, match="wandb=on is not a choice"):
            config.validate()
