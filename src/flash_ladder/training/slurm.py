"""A run as a SLURM job: a job file in the run's folder, submitted where `sbatch` is.

The job starts one process a GPU with srun. Before its time is up SLURM sends SIGUSR1; the run writes a checkpoint and ends with
exit code 138, and the job queues itself again. A job that starts once more, also after a node failed, goes on from the run's last
checkpoint, in the same folder.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from flash_ladder.errors import UserError
from flash_ladder.overrides import quoted, to_type_again
from flash_ladder.schema import Config

JOB_FILE = "job.sbatch"
AGAIN = 128 + signal.SIGUSR1  # how a run ends that was stopped by SIGUSR1


def submit(cfg: Config, run_dir: Path, overrides: list[str]) -> None:
    """Writes `run_dir`/job.sbatch and submits it; without `sbatch` on this machine it says how to do so.

    overrides: the command line's KEY=VALUE, as typed. Raises UserError where SLURM refuses the job, or the number of GPUs is not
    given.
    """
    job = run_dir.absolute() / JOB_FILE
    job.write_text(job_file(cfg, run_dir.absolute(), overrides), encoding="utf-8")
    command = ["sbatch", str(job)]
    if shutil.which("sbatch") is None:
        print(f"{job} is written; there is no sbatch here. Where there is one: {shlex.join(command)}")
        return
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refuses {job}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
    print(f"{done.stdout.strip()}: {job}")
    print(f"its output will be {run_dir.absolute()}/slurm-JOB.out")


def job_file(cfg: Config, run_dir: Path, overrides: list[str]) -> str:
    """The text of the job file of a run in `run_dir`, started from this folder with this Python."""
    slurm = cfg.slurm
    devices = cfg.trainer.context_parallel if cfg.trainer.devices is None else cfg.trainer.devices
    if not isinstance(devices, int) or devices < 1:
        raise UserError(
            f"slurm=submit needs a number of GPUs of a node, and trainer.devices is {devices}; trainer.devices=8 is one"
        )
    on_gpus = cfg.trainer.accelerator != "cpu"
    options = {
        "job-name": run_dir.name,
        "nodes": cfg.trainer.num_nodes or 1,
        "ntasks-per-node": devices,
        "gpus-per-node": devices if on_gpus else None,
        "cpus-per-task": slurm.cpus,
        "mem": slurm.mem,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "constraint": slurm.constraint,
        "output": f"{run_dir}/slurm-%j.out",
        "open-mode": "append",
        "signal": f"SIGUSR1@{slurm.signal_seconds}",
    }
    lines = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None] + [
        "--requeue",
        *slurm.extra,
    ]
    train = [sys.executable, str(Path(sys.argv[0]).resolve())]
    asked = [override for override in overrides if not override.startswith(("resume=", "slurm=", "slurm."))]
    anew = [*train, *asked, f"hydra.run.dir={quoted(str(run_dir))}", "slurm.submit=false"]
    go_on = [*train, f"resume={run_dir}", *to_type_again(asked), "slurm.submit=false"]
    folder = shlex.quote(str(run_dir))
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in lines),
            "",
            f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
            *slurm.setup,
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
            "export MASTER_PORT=$((15000 + SLURM_JOB_ID % 10000))",
            f"if [ -f {folder}/checkpoints/last.ckpt ]; then",
            f"    srun {shlex.join(go_on)}",
            "else  # nothing of an earlier start is worth keeping",
            f"    (cd {folder} && rm -rf config.yaml metrics.jsonl train.log checkpoints)",
            f"    srun {shlex.join(anew)}",
            "fi",
            "code=$?",
            f'[ "$code" -eq {AGAIN} ] && scontrol requeue "$SLURM_JOB_ID"  # SIGUSR1: stopped with a checkpoint',
            'exit "$code"',
            "",
        ]
    )
