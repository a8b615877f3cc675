"""Lightning's trainer for a run: one endless epoch of trainer.max_steps optimiser steps, with everything around the loop."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from flash_ladder.errors import UserError, first_line
from flash_ladder.machine.decide import Place
from flash_ladder.measure.flops import flops_per_token, peak_tflops
from flash_ladder.names import is_kernel
from flash_ladder.processes import Processes
from flash_ladder.schema import Config
from flash_ladder.training.callbacks import Bar, SaysHowLong, StopOnSignal, checkpoints
from flash_ladder.training.checkpoint import AtomicCheckpointIO
from flash_ladder.training.module import GPTModule
from flash_ladder.training.resume import BetweenSteps, Start
from flash_ladder.training.speed import Speed, Work
from flash_ladder.training.strategy import devices_and_strategy, is_first_process


def make_trainer(
    cfg: Config,
    run_dir: Path,
    place: Place,
    processes: Processes | None,
    start: Start,
    *,
    speed: Speed,
    arguments: dict[str, Any],
    callbacks: list[Callback],
) -> L.Trainer:
    """Lightning's trainer for one endless epoch of trainer.max_steps optimiser steps.

    processes: of training.ranks. start: of training.resume. arguments, callbacks: what the user adds (training.extras).
    """
    bar: list[Callback] = [Bar(speed)] if is_first_process() else []
    if bar and place.device.type == "cpu" and is_kernel(place.attention.backend):
        bar.append(SaysHowLong(speed, place.attention.backend))
    kept = checkpoints(run_dir / "checkpoints") if cfg.trainer.checkpoints else ()
    max_steps, val_every = cfg.trainer.max_steps, cfg.trainer.val_every
    only_validates = start.owes_validation and start.step >= max_steps
    if only_validates:  # Lightning would not begin where no step is left
        val_every = start.step
    ours: dict[str, Any] = {
        **devices_and_strategy(cfg.trainer, place, processes),
        # In Lightning's words. Beside masters, all that the network computes with is bf16 already, and nothing is to be cast.
        "precision": "32-true" if place.precision == "32" or cfg.trainer.master_weights else place.precision,
        "max_steps": max_steps + only_validates,
        "max_epochs": -1,
        "accumulate_grad_batches": cfg.trainer.accumulate,
        "val_check_interval": val_every * cfg.trainer.accumulate,  # in batches
        "check_val_every_n_epoch": None,
        "log_every_n_steps": cfg.trainer.log_every,
        "limit_val_batches": cfg.trainer.val_batches,
        "num_sanity_val_steps": 0,
        "deterministic": cfg.trainer.deterministic or None,
        "logger": False,  # they are opened once nothing can be refused any more
        "callbacks": [speed, *bar, *callbacks, StopOnSignal(cfg.trainer.log_every), BetweenSteps(start, max_steps), *kept],
        "enable_checkpointing": cfg.trainer.checkpoints,
        "plugins": [AtomicCheckpointIO()],
        "default_root_dir": run_dir,
        "use_distributed_sampler": False,  # TextData gives each device its share
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    try:
        return L.Trainer(**(ours | arguments))
    except (MisconfigurationException, TypeError, ValueError) as error:
        if not arguments:
            raise
        raise UserError(f"trainer.lightning={arguments}: Lightning refuses it ({first_line(error)})") from None


def quiet_lightning() -> None:
    """Keeps Lightning's notes off the screen, and its warnings that do not apply here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for about in (
        ".*does not have many workers.*",  # windows are read from a memory map; data.num_workers adds some
        ".*isinstance.treespec, LeafSpec.*",  # Lightning on a torch newer than itself
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's own
    ):
        warnings.filterwarnings("ignore", about)


def work(cfg: Config, place: Place, module: GPTModule) -> Work:
    """The work of one optimiser step, and the peak of the devices."""
    peak = peak_tflops(torch.cuda.get_device_name(place.device), place.precision) if place.device.type == "cuda" else None
    windows = [window for layer in range(cfg.model.n_layer) if (window := cfg.model.window_of(layer)) is not None]
    return Work(
        tokens=cfg.data.batch_size * cfg.data.seq_len * cfg.trainer.accumulate * place.data_parallel,
        flops=flops_per_token(module.net.n_params_matmul, cfg.model.n_layer, cfg.model.d_model, cfg.data.seq_len, windows),
        peak_tflops=None if peak is None else peak * place.n_devices,
    )
