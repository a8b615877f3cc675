"""What happens around the training loop: the progress bar, checkpoints, and a clean stop on Ctrl-C, SIGTERM or SIGUSR1."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tqdm import tqdm

from flash_ladder.errors import UserError
from flash_ladder.training import metrics
from flash_ladder.training.speed import Speed
from flash_ladder.training.strategy import is_first_process


class Bar(Callback):
    """A progress bar over optimiser steps, with loss and tokens/s as `speed` logs them, and the last validation loss."""

    bar: tqdm  # from the start of training on

    def __init__(self, speed: Speed) -> None:
        self.speed = speed

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, desc="training", unit="step", dynamic_ncols=True)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.speed.log_every == 0 or trainer.global_step >= trainer.max_steps:
            self._show(trainer)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.bar.set_description("validating")

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.bar.set_description("training", refresh=False)
        self._show(trainer)

    def _show(self, trainer: Trainer) -> None:
        shown = self.speed.latest
        words = [f"loss {shown[metrics.TRAIN_LOSS]:.3f}"] if shown else []
        if metrics.VAL_LOSS in trainer.callback_metrics:
            words.append(f"val {trainer.callback_metrics[metrics.VAL_LOSS]:.3f}")
        if metrics.TOKENS_PER_SECOND in shown:
            words.append(f"{shown[metrics.TOKENS_PER_SECOND]:,.0f} tokens/s")
        self.bar.n = trainer.global_step
        self.bar.set_postfix_str(", ".join(words))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.bar.close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class Stopped(Exception):
    """A signal asked the run to stop, and the run stopped between two optimiser steps."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopOnSignal(Callback):
    """On the first Ctrl-C, SIGTERM or SIGUSR1, raises Stopped at the end of an optimiser step; the second one acts at once.

    SLURM sends SIGUSR1 some time before a job's time is up.

    Several processes must stop at the same step, or one would wait for the others for ever. So they ask each other every
    `log_every` steps, where they synchronise anyway.
    """

    def __init__(self, log_every: int) -> None:
        self.log_every = log_every
        self.received = 0
        self.step = 0
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.step = trainer.global_step
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self.before[signum] = signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self._restore()
        if is_first_process():
            with suppress(OSError):  # print may not be called in a handler
                os.write(2, b"\nstopping between two steps; once more to stop at once\n")

    def _restore(self) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        self.before = {}

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        received = self.received
        if trainer.world_size > 1:
            if self.step % self.log_every:
                return
            everyone = torch.tensor(received, device=module.device)
            torch.distributed.all_reduce(everyone, torch.distributed.ReduceOp.MAX)
            received = int(everyone)
        if received and self.step < trainer.max_steps:
            raise Stopped(received)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._restore()


class LastCheckpoint(ModelCheckpoint):
    """checkpoints/last.ckpt: written after every validation, and where an exception ends the run between two steps.

    A UserError, which a loss that is not finite raises, leaves the good checkpoint before it. With several processes only Stopped
    makes one be written: after any other exception the other processes may never come to help.
    """

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        together = trainer.world_size == 1 or isinstance(exception, Stopped)
        if together and isinstance(exception, Exception) and not isinstance(exception, UserError):
            super().on_exception(trainer, module, exception)


def checkpoints(folder: Path) -> tuple[ModelCheckpoint, LastCheckpoint]:
    """The two checkpoints that a run keeps in `folder`: best.ckpt, of the lowest validation loss, and last.ckpt."""
    best = ModelCheckpoint(folder, "best", monitor=metrics.VAL_LOSS, mode="min", enable_version_counter=False)
    last = LastCheckpoint(folder, "last", save_on_exception=True, enable_version_counter=False)
    return best, last
