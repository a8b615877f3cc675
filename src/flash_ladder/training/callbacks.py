"""What happens around the training loop: speed, the progress bar, checkpoints, and a clean stop on Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tqdm import tqdm

from flash_ladder.errors import UserError
from flash_ladder.measure.flops import TokenFlops
from flash_ladder.training import metrics
from flash_ladder.training.module import GPTModule
from flash_ladder.training.record import peak_memory_gib, seconds_since_start
from flash_ladder.training.strategy import is_first_process


@dataclass(frozen=True)
class Work:
    """The work of one optimiser step on all devices together, and the peak of those devices."""

    tokens: int
    flops: TokenFlops  # of one token
    peak_tflops: float | None  # dense; None where it is unknown: then no MFU is logged


class Speed(Callback):
    """Sends loss, learning rate, speed and memory to the loggers, every `log_every` optimiser steps.

    The clock is read after a synchronise. It stands still during validation and checkpoints, and starts after the first step,
    which compiles and tunes. On other steps nothing here waits for the GPU.
    """

    def __init__(self, work: Work, log_every: int) -> None:
        self.work = work
        self.log_every = log_every
        self.first_step_seconds: float | None = None  # from the start of the process to the end of the first step
        self.latest: dict[str, float] = {}  # what was logged last
        self.step = 0
        self.clock: float | None = None  # when timing last began; None while the clock stands still
        self.seconds = 0.0  # of the interval so far
        self.interval_start = 0
        self.intervals: list[tuple[int, float]] = []  # steps and seconds of each full interval

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of the run less its first interval, in which clocks and caches warm up; None for a run of one step."""
        counted = self.intervals[1:] or self.intervals
        seconds = sum(s for _, s in counted)
        return self.work.tokens * sum(n for n, _ in counted) / seconds if seconds else None

    def rates(self, tokens_per_second: float) -> dict[str, float]:
        """Speed in tokens, in FLOPs, and as a share of the peak under both conventions."""
        full, causal = (tokens_per_second * flops / 1e12 for flops in (self.work.flops.full, self.work.flops.causal))
        rates = {metrics.TOKENS_PER_SECOND: tokens_per_second, metrics.MODEL_TFLOPS: full}
        if self.work.peak_tflops is not None:
            rates |= {metrics.MFU: full / self.work.peak_tflops, metrics.MFU_CAUSAL: causal / self.work.peak_tflops}
        return rates

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.clock is None and self.first_step_seconds is not None:
            self.clock = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            return  # more batches to accumulate
        self.step = trainer.global_step
        last = self.step >= trainer.max_steps
        if self.first_step_seconds is None:
            self._begin_interval(self._stop_clock(module.device))
            self.first_step_seconds = seconds_since_start()
        if self.step % self.log_every == 0 or last:
            self._log(trainer, cast("GPTModule", module))
        if last:
            trainer.should_stop = True  # Lightning validates once more, on the final weights, before it stops

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._stop_clock(module.device)

    def _stop_clock(self, device: torch.device) -> float:
        """Adds the time since the clock started; returns the time now."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if self.clock is not None:
            self.seconds += now - self.clock
        self.clock = None
        return now

    def _begin_interval(self, now: float) -> None:
        self.interval_start, self.seconds, self.clock = self.step, 0.0, now

    def _log(self, trainer: Trainer, module: GPTModule) -> None:
        now = self._stop_clock(module.device)
        logged = {metrics.TRAIN_LOSS: module.step_loss, metrics.TRAIN_LR: module.step_lr}
        if self.first_step_seconds is not None and not self.latest:
            logged[metrics.FIRST_STEP_SECONDS] = self.first_step_seconds
        steps = self.step - self.interval_start
        if steps:
            self.intervals.append((steps, self.seconds))
            logged |= self.rates(self.work.tokens * steps / self.seconds)
        logged[metrics.PEAK_GIB] = peak_memory_gib(module.device)
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=self.step)
        self.latest = logged
        self._begin_interval(now)


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
            os.write(2, b"\nstopping between two steps; once more to stop at once\n")  # print may not be called in a handler

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
