"""Where the time of a step goes: a trace and a table of kernels, of a few steps of a run (trainer.profile=true)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

WAIT = 3  # steps before: they compile, tune and warm up
STEPS = 3  # steps recorded
ROWS = 40  # of the table


class Profile(Callback):
    """Records STEPS optimiser steps of the first process with torch.profiler, into `folder`.

    trace.json.gz is for a viewer of Chrome traces (https://ui.perfetto.dev), kernels.txt for a reader: operations and kernels by
    their own time. A shorter run is recorded as far as it goes. The steps that are recorded run slower than the others.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.profiler: profile | None = None
        self.start = self.stop = 0  # steps

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        left = trainer.max_steps - trainer.global_step
        self.start = trainer.global_step + max(0, min(WAIT, left - STEPS))
        self.stop = self.start + STEPS

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.profiler is None and self.start <= trainer.global_step < self.stop and trainer.is_global_zero:
            on_gpu = [ProfilerActivity.CUDA] if module.device.type == "cuda" else []
            self.profiler = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self.profiler.start()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= self.stop:
            self._write(module.device)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._write(module.device)

    def _write(self, device: torch.device) -> None:
        if self.profiler is None:
            return
        profiler, self.profiler, self.stop = self.profiler, None, 0
        profiler.stop()
        self.folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=80)
        (self.folder / "kernels.txt").write_text(table + "\n", encoding="utf-8")
