"""What happens around the training loop: the progress bar, checkpoints, and a clean stop on a signal."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tqdm import tqdm

from flash_ladder import stopping
from flash_ladder.errors import UserError
from flash_ladder.training import metrics
from flash_ladder.training.log import warn
from flash_ladder.training.speed import Speed
from flash_ladder.units import duration

BAR_SECONDS = 1.0  # after which a step is shown that is not logged
LONG_SECONDS = 600.0  # of training on an interpreted kernel, beyond which a warning says so


class Bar(Callback):
    """A progress bar over optimiser steps, with loss and tokens/s as `speed` logs them, and the last validation loss.

    Steps that are logged are shown, and between them one a BAR_SECONDS.
    """

    bar: tqdm  # from the start of training on

    def __init__(self, speed: Speed) -> None:
        self.speed = speed
        self.shown = 0.0  # when

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, desc="training", unit="step", dynamic_ncols=True)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        logged = trainer.global_step % self.speed.log_every == 0 or trainer.global_step >= trainer.max_steps
        if logged or time.monotonic() - self.shown >= BAR_SECONDS:
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
        self.shown = time.monotonic()
        self.bar.n = trainer.global_step
        self.bar.set_postfix_str(", ".join(words))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.bar.close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class SaysHowLong(Callback):
    """Warns once, after the first steps that were timed, where an interpreted `backend` will take longer than LONG_SECONDS."""

    def __init__(self, speed: Speed, backend: str) -> None:
        self.speed = speed
        self.backend = backend
        self.judged = False

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.judged or not self.speed.intervals:
            return
        self.judged = True
        timed, left = self.speed.intervals[0], trainer.max_steps - trainer.global_step
        seconds = left * timed.seconds / timed.steps
        if seconds > LONG_SECONDS:
            warn(
                f"{self.backend} is interpreted on a CPU: {left} steps more will take about {duration(seconds)}; "
                f"attention=sdpa trains the same model in a small part of that, and trainer.max_steps=20 is enough to look"
            )


class Stopped(Exception):
    """A signal asked the run to stop, and the run stopped between two optimiser steps."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopOnSignal(Callback):
    """On the first signal to stop (stopping.SIGNALS), raises Stopped at the end of an optimiser step; the second one acts at once.

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
        self.before = stopping.handle(self._receive)

    def _receive(self, signum: int) -> None:
        if self.received:
            stopping.end_at_once(signum)
        self.received = signum
        stopping.say("stopping between two steps; once more to stop at once")

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        if self.step < trainer.max_steps and (trainer.world_size == 1 or self.step % self.log_every == 0):
            self._stop_if_asked(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._stop_if_asked(trainer, module)  # after the last step, its validation and its checkpoints
        stopping.restore(self.before)

    def _stop_if_asked(self, trainer: Trainer, module: LightningModule) -> None:
        received = self.received
        if trainer.world_size > 1:
            everyone = torch.tensor(received, device=module.device)
            torch.distributed.all_reduce(everyone, torch.distributed.ReduceOp.MAX)
            received = int(everyone)
        if received:
            raise Stopped(received)

    # After an exception the last checkpoint is written first, and then Lightning restores all handlers itself.


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
