"""Two processes on one machine, joined by gloo, train as one process does on the same global batch."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flash_ladder.training.run import train
from tests.helpers.tiny import metrics, overrides, tiny_config, values

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    cfg = tiny_config(
        folder, devices=2, strategy="ddp", max_steps=4, val_every=2, val_batches=4
    )  # of one window each, so the same 4
    cfg = replace(cfg, data=replace(cfg.data, batch_size=1))  # of one window, where `alone` has two
    train_py = [sys.executable, ROOT / "train.py", *overrides(cfg), "hydra.run.dir=run"]
    done = subprocess.run(train_py, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_two_processes_share_one_run(pair):
    folder, done = pair
    assert {p.name for p in folder.iterdir()} == {"text", "cache", "run"}
    assert done.stdout.count("attention: sdpa") == 1 and done.stdout.count("validation   loss") == 1
    assert [line["step"] for line in metrics(folder / "run")] == [0, 1, 2, 2, 3, 4, 4]


def test_two_processes_train_as_one_on_the_same_global_batch(pair):
    folder, _ = pair
    alone = tiny_config(folder, max_steps=4, val_every=2)
    train(alone, folder / "alone")
    for name in ("train/loss", "val/loss"):
        expected = values(folder / "alone", name)
        assert values(folder / "run", name) == pytest.approx(expected, rel=1e-5), name
    one, both = (
        torch.load(folder / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in ("alone", "run")
    )
    for name in one:
        torch.testing.assert_close(both[name], one[name], rtol=1e-4, atol=1e-5)


def test_a_signal_to_the_first_process_stops_both_at_one_step(tmp_path):
    cfg = tiny_config(tmp_path, devices=2, strategy="ddp", max_steps=1_000_000, val_every=1_000_000, log_every=10)
    train_py = [sys.executable, ROOT / "train.py", *overrides(cfg), "hydra.run.dir=run"]
    process = subprocess.Popen(train_py, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        record = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None and not (record.exists() and record.read_text().count("\n") > 3):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, errors
    step = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert f"stopped by SIGTERM after step {step}; to go on: python train.py resume=" in printed
    assert step % 10 == 0 and "Traceback" not in errors
