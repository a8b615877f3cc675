"""How fast a run goes and what it takes: tokens a second, the share of the peak, memory and energy, of all devices together."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from flash_ladder.measure.energy import EnergyCounter
from flash_ladder.measure.flops import TokenFlops
from flash_ladder.training import metrics
from flash_ladder.training.module import GPTModule
from flash_ladder.units import GIB

WINDOW_SECONDS = 10.0  # a logged speed is that of the last interval, and of those before it that fit into so many seconds
EARLY_STEPS = (2, 5)  # logged as well, so that a run with a large log_every shows its speed soon


@dataclass(frozen=True)
class Work:
    """The work of one optimiser step on all devices together, and the peak of those devices."""

    tokens: int
    flops: TokenFlops  # of one token
    peak_tflops: float | None  # dense; None where it is unknown: then no MFU is logged

    def rates(self, tokens_per_second: float) -> dict[str, float]:
        """Speed in tokens, in FLOPs, and as a share of the peak under both conventions."""
        full, causal = (tokens_per_second * flops / 1e12 for flops in (self.flops.full, self.flops.causal))
        rates = {metrics.TOKENS_PER_SECOND: tokens_per_second, metrics.MODEL_TFLOPS: full}
        if self.peak_tflops is not None:
            rates |= {metrics.MFU: full / self.peak_tflops, metrics.MFU_CAUSAL: causal / self.peak_tflops}
        return rates


class Interval(NamedTuple):
    """The steps between two lines of the log, validation and checkpoints left out."""

    steps: int
    seconds: float
    joules: float  # of all devices; nan where one of them counts no energy
    warm: bool  # clocks, caches and the allocator have settled: it ended after the run's first log_every steps


class Speed(Callback):
    """Sends loss, learning rate, gradient norm, speed, memory and energy to the loggers, every `log_every` optimiser steps.

    The clock is read after a synchronise. It stands still during validation and checkpoints, and starts after the first step,
    which compiles and tunes. On other steps nothing here waits for the GPU. started: `time.perf_counter()` at the run's start.
    """

    def __init__(self, work: Work, log_every: int, started: float) -> None:
        self.work = work
        self.log_every = log_every
        self.started = started
        self.first_step_seconds: float | None = None
        self.latest: dict[str, float] = {}  # what was logged last
        self.intervals: list[Interval] = []
        self.begin = 0  # the step that training began after
        self.step = 0
        self.energy: EnergyCounter | None = None  # from the start of training on
        self._set_to_zero(0)

    def _set_to_zero(self, step: int) -> None:
        """Begins an interval after `step`, with the clock standing still."""
        self.interval_start, self.seconds, self.joules = step, 0.0, 0.0
        self.clock: float | None = None  # when timing last began; None while the clock stands still
        self.meter = 0.0  # what the energy counter said then

    def summary(self) -> dict[str, float]:
        """Speed and energy of the run less its first intervals, in which clocks and caches warm up; {} for a run of one step."""
        return self._rates([i for i in self.intervals if i.warm] or self.intervals[1:] or self.intervals)

    def window(self) -> dict[str, float]:
        """Speed and energy of the latest steps; {} where there are none yet."""
        seconds = 0.0
        latest: list[Interval] = []
        for interval in reversed(self.intervals):
            seconds += interval.seconds
            if latest and seconds > WINDOW_SECONDS:
                break
            latest.append(interval)
        return self._rates(latest)

    def _rates(self, intervals: list[Interval]) -> dict[str, float]:
        seconds, joules = sum(i.seconds for i in intervals), sum(i.joules for i in intervals)
        if not seconds:
            return {}
        tokens = self.work.tokens * sum(i.steps for i in intervals)
        used = {} if math.isnan(joules) else {metrics.JOULES_PER_TOKEN: joules / tokens, metrics.WATTS: joules / seconds}
        return self.work.rates(tokens / seconds) | used

    # ---- around the training loop ----

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.begin = self.step = trainer.global_step
        self.energy = EnergyCounter(module.device)
        reset_peak_memory(module.device)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.clock is None and self.first_step_seconds is not None:
            self._start_clock()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            return  # more batches to accumulate
        self.step = trainer.global_step
        last = self.step >= trainer.max_steps
        if self.first_step_seconds is None:
            wait_for(module.device)
            self.first_step_seconds = time.perf_counter() - self.started
            self._set_to_zero(self.step)
            self._start_clock()
        early = self.step - self.begin in EARLY_STEPS and self.step - self.begin < self.log_every
        if self.step % self.log_every == 0 or early or last:
            self._log(trainer, cast("GPTModule", module))
        if last:
            trainer.should_stop = True  # Lightning validates once more, on the final weights, before it stops

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._stop_clock(module.device)

    def _start_clock(self) -> None:
        assert self.energy is not None
        self.meter = self.energy.joules()
        self.clock = time.perf_counter()

    def _stop_clock(self, device: torch.device) -> None:
        """Adds time and energy since the clock started."""
        wait_for(device)
        if self.clock is not None and self.energy is not None:
            self.seconds += time.perf_counter() - self.clock
            self.joules += self.energy.joules() - self.meter
        self.clock = None

    def _log(self, trainer: Trainer, module: GPTModule) -> None:
        self._stop_clock(module.device)
        peaks, joules = zip(*of_all_devices([peak_memory_gib(module.device), self.joules], module.device), strict=True)
        steps = self.step - self.interval_start
        if steps:
            self.intervals.append(Interval(steps, self.seconds, sum(joules), self.step - self.begin > self.log_every))
        logged = {metrics.TRAIN_LOSS: module.step_loss, metrics.TRAIN_LR: module.step_lr, metrics.GRAD_NORM: module.grad_norm()}
        if self.first_step_seconds is not None and not self.latest:
            logged[metrics.FIRST_STEP_SECONDS] = self.first_step_seconds
        logged |= self.window() | {metrics.PEAK_GIB: max(peaks), metrics.PEAK_SUM_GIB: sum(peaks)}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=self.step)
        self.latest = logged
        self._set_to_zero(self.step)
        self._start_clock()


# ---- what a device says ----


def wait_for(device: torch.device) -> None:
    """Waits until `device` has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def of_all_devices(values: list[float], device: torch.device) -> list[list[float]]:
    """`values` of every process, in the order of ranks; all processes call it together."""
    if not torch.distributed.is_initialized():
        return [values]
    own = torch.tensor(values, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, own)
    return [one.tolist() for one in everyone]


def reset_peak_memory(device: torch.device) -> None:
    """Lets `peak_memory_gib` count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # where the system refuses, the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: on a GPU, of the tensors; on a CPU, of this process's resident set (Linux: VmHWM)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / GIB
