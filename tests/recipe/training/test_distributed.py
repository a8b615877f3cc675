"""Two processes on one machine, joined by gloo, train as one process does on the same global batch."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flash_ladder.training.run import train
from tests.helpers.commands import Command
from tests.helpers.once import made_once
from tests.helpers.tiny import overrides, tiny_config, values

ROOT = Path(__file__).parents[3]


def start(cfg, folder, *further, run="run"):
    """train.py on `cfg` in `folder`."""
    return Command("train.py", [*overrides(cfg), f"hydra.run.dir={run}", *further], folder)


def finish(process):
    """What a process of `start` printed, and its errors; a process that hangs is stopped, with those that it started."""
    try:
        code = process.wait()
    finally:
        process.kill()
    printed, errors = process.printed()
    assert code == 0, errors
    return printed


def checkpoint(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process, of two batches a step: the folder, and what runs on two are given, with batches half as large."""

    def config(folder):
        return tiny_config(folder, max_steps=4, val_every=2, accumulate=2)

    folder = made_once(tmp_path_factory, "alone", lambda folder: train(config(folder), folder / "run"))
    cfg = config(folder)
    cfg = replace(cfg, trainer=replace(cfg.trainer, devices=2, val_batches=4))  # of one window each, so the same 4
    return folder, replace(cfg, data=replace(cfg.data, batch_size=1))


@pytest.fixture(scope="module", params=[("ddp", "weights"), ("fsdp", "weights"), ("fsdp", "optimizer")], ids="-".join)
def pair(request, alone, tmp_path_factory):
    """A run of two processes: the folder, and what it printed."""
    _, cfg = alone
    strategy, shard = request.param

    def make(folder):
        (folder / "there").mkdir()
        prompt = 'prompt=it\'s "x" {1}\\'  # 13 of seq_len's 16 tokens; quoted twice it would be more
        process = start(replace(cfg, trainer=replace(cfg.trainer, strategy=strategy, shard=shard)), folder / "there", prompt)
        (folder / "printed").write_text(finish(process))

    folder = made_once(tmp_path_factory, "-".join(request.param), make)
    return folder / "there", (folder / "printed").read_text()


def test_two_processes_share_one_run(pair):
    folder, printed = pair
    assert {p.name for p in folder.iterdir()} == {"run"}
    assert printed.count("attention: sdpa") == 1 and printed.count("validation   loss") == 1
    assert sorted(values(folder / "run", "train/loss")) == [1, 2, 3, 4] and sorted(values(folder / "run", "val/loss")) == [2, 4]


def test_two_processes_train_as_one_on_the_same_global_batch(pair, alone):
    one, both = alone[0] / "run", pair[0] / "run"
    for name in ("train/loss", "val/loss"):
        assert values(both, name) == pytest.approx(values(one, name), rel=1e-5), name


def test_their_checkpoint_is_the_file_of_one_process(pair, alone):
    one, both = checkpoint(alone[0] / "run"), checkpoint(pair[0] / "run")
    assert list(both) == list(one) and list(both["state_dict"]) == list(one["state_dict"])
    (mine,), (theirs,) = one["optimizer_states"], both["optimizer_states"]
    assert theirs["param_groups"] == mine["param_groups"] and list(theirs["state"]) == list(mine["state"])
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(both["state_dict"][name], weight, rtol=1e-4, atol=1e-5)
    for number, state in mine["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(theirs["state"][number][name], value, rtol=1e-3, atol=1e-6)


def go_on_alone(run, alone):
    """Resumes `run`, of 4 steps, on one process up to step 6; returns the losses of steps 5 and 6."""
    cfg = tiny_config(alone[0], max_steps=6, val_every=2, accumulate=2)
    train(replace(cfg, resume=str(run)), run)
    losses = values(run, "train/loss")
    return [losses[5], losses[6]]


def test_one_process_goes_on_where_two_stopped(pair, alone, tmp_path):
    shutil.copytree(alone[0] / "run", tmp_path / "one")
    shutil.copytree(pair[0] / "run", tmp_path / "both")
    assert go_on_alone(tmp_path / "both", alone) == pytest.approx(go_on_alone(tmp_path / "one", alone), rel=1e-5)


def test_two_sharded_processes_of_torchrun_go_on_where_one_stopped(alone, tmp_path):
    shutil.copytree(alone[0] / "run", tmp_path / "one")
    shutil.copytree(alone[0] / "run", tmp_path / "run")
    hydra = tmp_path / "run" / ".hydra"  # which a run in this process does not write
    hydra.mkdir()
    (hydra / "overrides.yaml").write_text("[]\n")
    _, cfg = alone
    cfg = replace(cfg, trainer=replace(cfg.trainer, devices=None, strategy="fsdp", max_steps=6))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, ROOT / "train.py", *overrides(cfg), "resume=run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    losses = values(tmp_path / "run", "train/loss")
    assert [losses[5], losses[6]] == pytest.approx(go_on_alone(tmp_path / "one", alone), rel=1e-5)
    assert {p.name for p in tmp_path.iterdir()} == {"one", "run"}


def test_two_processes_that_share_sequences_train_as_one(alone, tmp_path):
    cfg = tiny_config(alone[0], max_steps=4, val_every=2, accumulate=2, context_parallel=2)
    printed = finish(start(cfg, tmp_path))
    assert "attention memory: one layer (batch 2, 1 heads, 16 positions" in printed
    for name in ("train/loss", "val/loss"):
        assert values(tmp_path / "run", name) == pytest.approx(values(alone[0] / "run", name), rel=1e-6), name
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["setting"]["tokens_per_step"], result["setting"]["n_devices"]) == ("finished", 64, 2)
    shutil.copytree(alone[0] / "run", tmp_path / "one")
    assert go_on_alone(tmp_path / "run", alone) == pytest.approx(go_on_alone(tmp_path / "one", alone), rel=1e-5)


def wait_for_steps(process, record, n=3):
    while process.poll() is None and not (record.exists() and record.read_text().count("\n") > n):
        time.sleep(0.1)


def test_a_process_that_dies_ends_the_run_and_is_named(alone, tmp_path):
    _, cfg = alone
    cfg = replace(cfg, trainer=replace(cfg.trainer, strategy="fsdp", context_parallel=2, max_steps=1_000_000, val_every=1_000_000))
    process = start(cfg, tmp_path)
    try:
        wait_for_steps(process, tmp_path / "run" / "metrics.jsonl")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (other,) = [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(other, signal.SIGKILL)
        code = process.wait(60)
    finally:
        process.kill()
    _, errors = process.printed()
    assert code == 1, errors
    assert f"error: rank 1 (process {other} on {socket.gethostname()}) has died (SIGKILL)" in errors
    assert "Traceback" not in errors
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


def test_a_signal_to_the_first_process_stops_both_at_one_step(tmp_path):
    cfg = tiny_config(tmp_path, devices=2, strategy="ddp", max_steps=1_000_000, val_every=1_000_000, log_every=10)
    process = start(cfg, tmp_path)
    try:
        wait_for_steps(process, tmp_path / "run" / "metrics.jsonl")
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    finally:
        process.kill()
    printed, errors = process.printed()
    assert code == 128 + signal.SIGTERM, errors
    step = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert f"stopped by SIGTERM after step {step}; to go on: python train.py resume=" in printed
    assert step % 10 == 0 and "Traceback" not in errors
