"""Sweeps of real trainings, as small as they go, as a user starts, stops and kills them."""

import json
import os
import signal
import subprocess
import time

import pytest

from tests.helpers.commands import Command
from tests.helpers.tiny import overrides, tiny_config, values


@pytest.fixture
def start(tmp_path):
    """Starts `train.py` on a tiny corpus, in a session of its own; the sweep's folder is `s`."""

    def call(*arguments, **trainer):
        typed = overrides(tiny_config(tmp_path, **trainer)) if "-m" in arguments else []
        return Command("train.py", [*typed, *arguments], tmp_path)

    return call


def points(folder):
    return json.loads((folder / "s" / "points.json").read_text())["points"]


def wait_for(what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_point_that_diverges_is_not_the_end(start, tmp_path):
    assert start("-m", "optimizer.lr=1e30,1e-2", "hydra.sweep.dir=s").wait(300) == 1
    bad, good = points(tmp_path)
    assert bad["status"] in ("not_finite", "failed") and "the training loss is nan" in bad["error"] and bad["exit_code"] == 2
    assert good["status"] == "finished" and good["exit_code"] == 0
    assert max(values(tmp_path / "s" / "1", "val/loss")) == 6
    assert "1.0e30" not in (tmp_path / "s" / "1" / "console.log").read_text()


def test_a_sweep_that_is_stopped_goes_on_and_a_killed_point_with_it(start, tmp_path):
    sweep = start("-m", "seed=1,2", "hydra.sweep.dir=s", "hydra.launcher.at_once=2", max_steps=3000, val_every=20)
    checkpoints = [tmp_path / "s" / number / "checkpoints" / "last.ckpt" for number in "01"]
    wait_for(lambda: all(path.exists() for path in checkpoints))
    first, _ = (int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(sweep.pid)], text=True).split())
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: any(point["status"] == "killed" for point in points(tmp_path)))
    os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does: the points are in sessions of their own
    assert sweep.wait(120) == 130
    assert sorted(point["status"] for point in points(tmp_path)) == ["interrupted", "killed"]
    assert "sweep=s" in "".join(sweep.printed())

    for number in "01":  # few steps are left to do
        saved = tmp_path / "s" / number / ".hydra" / "overrides.yaml"
        done = max(values(tmp_path / "s" / number, "train/loss"))
        saved.write_text(saved.read_text().replace("trainer.max_steps=3000", f"trainer.max_steps={done + 5}"))
    assert start("sweep=s").wait(300) == 0
    assert [point["status"] for point in points(tmp_path)] == ["finished"] * 2
    assert all("resuming after step" in (tmp_path / "s" / number / "console.log").read_text() for number in "01")


def test_under_hydras_basic_launcher_the_other_points_run(start, tmp_path):
    sweep = start("-m", "optimizer.lr=1e30,1e-2", "hydra.sweep.dir=s", "hydra/launcher=basic")
    assert sweep.wait(300) == 1
    assert max(values(tmp_path / "s" / "1", "val/loss")) == 6
    assert "error: the training loss is nan" in "".join(sweep.printed())
