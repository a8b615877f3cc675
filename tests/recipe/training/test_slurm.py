"""flash_ladder.training.slurm: the job file, given to a SLURM of three scripts that ends a job and starts it again."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash_ladder.errors import UserError
from flash_ladder.schema import Config
from flash_ladder.training.slurm import job_file
from tests.helpers.tiny import overrides, tiny_config, values

ROOT = Path(__file__).parents[3]
SBATCH = """#!/bin/bash
echo "Submitted batch job 42"
cp "$1" submitted
"""
# Starts two tasks. The first start of a job is told after 3 steps that its time is nearly up.
SRUN = """#!/bin/bash
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids[$i]=$!; done
if [ ! -e signalled ]; then
    until [ "$(cat run/metrics.jsonl 2>/dev/null | wc -l)" -gt 3 ]; do sleep 0.1; done
    touch signalled
    kill -USR1 ${pids[@]}
fi
worst=0
for pid in ${pids[@]}; do wait $pid; code=$?; [ $code -gt $worst ] && worst=$code; done
exit $worst
"""
SCONTROL = """#!/bin/bash
case "$1" in show) echo 127.0.0.1 ;; requeue) echo "$2" >> requeued ;; esac
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with sbatch, srun and scontrol on the path."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_a_job_stops_with_a_checkpoint_queues_itself_again_and_goes_on(cluster):
    cfg = tiny_config(cluster, devices=2, strategy="ddp", max_steps=400, val_every=1000)
    command = [sys.executable, ROOT / "train.py", *overrides(cfg), "hydra.run.dir=run", "slurm=submit", "prompt=it's {x} "]
    done = subprocess.run(command, cwd=cluster, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Submitted batch job 42" in done.stdout, done.stderr
    assert not (cluster / "run" / "config.yaml").exists()

    environ = os.environ | {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "localhost", "SLURM_CPUS_PER_TASK": "1"}
    job = ["bash", cluster / "submitted"]
    first = subprocess.run(job, cwd="/", env=environ, capture_output=True, text=True, timeout=120)
    assert first.returncode == 138, first.stderr
    assert "stopped by SIGUSR1 after step" in first.stdout and (cluster / "requeued").read_text() == "42\n"
    step = torch.load(cluster / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 400

    second = subprocess.run(job, cwd="/", env=environ, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    assert f"resuming after step {step}" in second.stdout and "it's {x} " in second.stdout
    assert sorted(values(cluster / "run", "train/loss"))[-1] == 400
    assert (cluster / "requeued").read_text() == "42\n"


def test_what_is_asked_of_slurm():
    cfg = Config()
    cfg.trainer.devices, cfg.trainer.num_nodes = 8, 2
    cfg.slurm.partition, cfg.slurm.extra, cfg.slurm.setup = "gpu", ["--qos=high"], ["module load cuda"]
    text = job_file(cfg, Path("/runs/a b"), ["trainer=fsdp"])
    for option in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "partition=gpu", "signal=SIGUSR1@120", "requeue", "qos=high"):
        assert f"#SBATCH --{option}\n" in text
    assert "#SBATCH --output='/runs/a b/slurm-%j.out'\n" in text and "\nmodule load cuda\n" in text and "--mem" not in text


def test_a_sequence_over_gpus_asks_for_as_many():
    cfg = Config()
    cfg.trainer.context_parallel = 4
    assert "#SBATCH --gpus-per-node=4\n" in job_file(cfg, Path("/runs/a"), [])


def test_the_number_of_gpus_must_be_given():
    cfg = Config()
    cfg.trainer.devices = "auto"
    with pytest.raises(UserError, match=r"trainer\.devices is auto"):
        job_file(cfg, Path("/runs/a"), [])
