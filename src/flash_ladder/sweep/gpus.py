"""The GPUs of this machine, lent to the points of a sweep so that no two have the same one."""

from __future__ import annotations

import os
import subprocess
import sys

from flash_ladder.errors import UserError
from flash_ladder.schema import TrainerConfig, too_few_gpus


class Pool:
    """GPUs, and which of them are free."""

    def __init__(self, gpus: list[int | str]) -> None:
        self.gpus = gpus  # numbers, or names such as CUDA_VISIBLE_DEVICES has them
        self.free = list(gpus)

    def take(self, n: int) -> list[int | str] | None:
        """Lends `n` GPUs; None where fewer are free."""
        if n > len(self.free):
            return None
        taken, self.free = self.free[:n], self.free[n:]
        return taken

    def give_back(self, gpus: list[int | str]) -> None:
        """Takes lent GPUs back."""
        self.free = [gpu for gpu in self.gpus if gpu in self.free or gpu in gpus]

    def __str__(self) -> str:
        return f"{len(self.gpus)} GPU{'s' * (len(self.gpus) != 1)}" if self.gpus else "the CPU"


def gpus_here() -> list[int | str]:
    """What a process started now would see: as many as PyTorch counts, under the names in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return []
    # In a process of its own: counting loads torch, which a sweep has no other use for.
    count = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"PyTorch cannot be asked for GPUs: {(done.stderr.strip().splitlines() or ['it died'])[-1]}")
    n = int(done.stdout)
    if visible is None:
        return list(range(n))
    return [int(name) if name.isdigit() else name for name in map(str.strip, visible.split(","))][:n]


def gpus_needed(trainer: TrainerConfig, there: int) -> int:
    """How many of the `there` GPUs a run takes; 0 for a run on the CPU. Raises UserError where there are too few."""
    if trainer.accelerator == "cpu":
        return 0
    if not there:
        if trainer.accelerator == "gpu":
            raise UserError("trainer.accelerator=gpu: PyTorch finds no GPU here; trainer.accelerator=auto runs on the CPU")
        return 0
    if trainer.devices in ("auto", "-1", -1):
        return there
    n = int(trainer.devices or trainer.context_parallel)
    if n > there:
        raise too_few_gpus(trainer, n, there)
    return n
