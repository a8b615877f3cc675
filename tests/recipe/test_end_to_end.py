"""Train, export, evaluate, generate: the commands themselves, one after the other, on a text of ten kilobytes."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import commands
from tests.helpers.tiny import overrides, tiny_config, values


def command(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    done = commands.run(script, *arguments, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("end_to_end")
    cfg = tiny_config(folder, max_steps=60, val_every=30)
    done = command("train.py", *overrides(cfg), "model.d_model=32", "hydra.run.dir=run", cwd=folder)
    return folder, done.stdout


def test_training_learns_more_than_frequencies(trained):
    folder, said = trained
    environment = json.loads((folder / "run" / "environment.json").read_text())
    losses = values(folder / "run", "val/loss")
    assert sorted(losses) == [30, 60]
    assert losses[60] < environment["data"]["unigram_entropy"] < math.log(257)
    assert "python scripts/export.py run=run" in said


def test_the_export_is_the_trained_model_and_evaluates_anywhere(trained):
    folder, _ = trained
    exported = command("scripts/export.py", "run=run", cwd=folder)
    assert "beyond" not in exported.stdout.lower() and exported.stdout.endswith("exported to run/export\n")
    parity = json.loads((folder / "run" / "export" / "parity.json").read_text())
    assert parity["within"] and parity["checks"]["|Δ loss| to training"]["value"] < 1e-5
    losses = values(folder / "run", "val/loss")
    assert parity["loss"]["eager"] == pytest.approx(min(losses.values()), abs=1e-5)

    # On another machine there is nothing but the folder.
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (folder / "run" / "export").rename(elsewhere / "model")
    for gone in ("run", "text", "cache"):
        shutil.rmtree(folder / gone)
    evaluated = command("scripts/evaluate.py", "model=model", "attention=eager", "out=result.json", cwd=elsewhere)
    assert "attention: eager (asked for" in evaluated.stdout
    result = json.loads((elsewhere / "result.json").read_text())
    assert result["within"] and result["evaluation"]["loss"] == pytest.approx(parity["loss"]["sdpa"], abs=1e-5)

    written = command("scripts/generate.py", "model=model", "prompt=def f", "max_new_tokens=40", cwd=elsewhere)
    again = command("scripts/generate.py", "model=model", "prompt=def f", "max_new_tokens=40", cwd=elsewhere)
    assert written.stdout.startswith("def f") and written.stdout == again.stdout
    assert sorted(p.name for p in elsewhere.iterdir()) == ["model", "result.json"]
