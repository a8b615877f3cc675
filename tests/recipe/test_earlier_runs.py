"""Run folders and exports that earlier code wrote still load: resumed, exported again, evaluated."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers import commands

EARLIER = Path(__file__).with_name("earlier_run")
# Step 7 as the code that wrote the run logged it when it went on with it; the last digits depend on the processor. The steps
# after it are other ones than that code's, which took step 7 at the rate of the checkpoint and not of the longer schedule.
LOSSES = {7: 5.609635, 8: 5.551316, 9: 5.550256}


@pytest.fixture
def folder(tmp_path):
    """A copy of the earlier run, beside the text that it was trained on."""
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    return tmp_path


def command(folder: Path, script: str, *arguments: str) -> str:
    """Runs a script in `folder`; returns what it printed."""
    run = commands.run(script, *arguments, cwd=folder)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_an_earlier_run_goes_on(folder):
    command(folder, "train.py", "resume=run", "trainer.max_steps=9")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["train/loss"] for row in rows if row["step"] > 6 and "train/loss" in row}
    assert losses == pytest.approx(LOSSES, abs=1e-4)


def test_an_earlier_run_is_exported(folder):
    command(folder, "scripts/export.py", "run=run", "checkpoint=last", "out=again")
    recorded, again = (json.loads((folder / path / "parity.json").read_text()) for path in ("run/export", "again"))
    assert again["loss"] == pytest.approx(recorded["loss"], abs=1e-5)


def test_an_earlier_export_is_evaluated(folder):
    printed = command(folder, "scripts/evaluate.py", "model=run/export", "attention=eager")
    assert "|Δ loss| to export (sdpa)" in printed and "BEYOND" not in printed
