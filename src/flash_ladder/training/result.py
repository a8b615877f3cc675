"""result.json: how a run ended, what it was, and what it came to. A sweep's table and pictures are made of these."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from flash_ladder.errors import UserError, first_line
from flash_ladder.files import write_json
from flash_ladder.machine.decide import Place
from flash_ladder.names import FAILED, NOT_FINITE, OUT_OF_MEMORY, STOPPED
from flash_ladder.schema import Config
from flash_ladder.stopping import Ended
from flash_ladder.training.module import NotFinite


class OutOfMemory(UserError):
    """A device, or this machine, has no memory left for what was asked."""


@dataclass
class Result:
    """What result.json holds."""

    setting: dict[str, Any]  # what was run, of `setting`
    max_steps: int
    status: str = FAILED
    error: str | None = None  # one line
    step: int = 0  # optimiser steps taken, those before a resume included
    seconds: float = 0.0  # since the run, or its resumption, started
    metrics: dict[str, float] = field(default_factory=dict)  # the last value of each; speeds are of the run less its beginning
    sample: str | None = None

    def ended_by(self, error: BaseException) -> None:
        """Takes status and error from what ended the run."""
        self.status = {OutOfMemory: OUT_OF_MEMORY, NotFinite: NOT_FINITE, KeyboardInterrupt: STOPPED, Ended: STOPPED}.get(
            type(error), FAILED
        )
        self.error = first_line(error)

    def write(self, run_dir: Path) -> None:
        """Writes `run_dir`/result.json, all of it or nothing."""
        write_json(run_dir / "result.json", asdict(self))


def setting(cfg: Config, place: Place, n_params: int, tokens_per_step: int) -> dict[str, Any]:
    """What a run's speed and memory depend on."""
    return {
        "backend": place.attention.backend,
        "seq_len": cfg.data.seq_len,
        "batch_size": cfg.data.batch_size,
        "accumulate": cfg.trainer.accumulate,
        "n_devices": place.n_devices,
        "n_nodes": place.n_nodes,
        "context_parallel": place.context_parallel,
        "strategy": "ddp" if cfg.trainer.strategy == "auto" and place.n_devices > 1 else cfg.trainer.strategy,
        "precision": place.precision,
        "compile": cfg.trainer.compile,
        "n_params": n_params,
        "tokens_per_step": tokens_per_step,
        "gpu": torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else None,
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or in this machine."""
    words = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
