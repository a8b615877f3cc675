"""How a run is spread over devices: one process alone, or one a device under DDP."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from flash_ladder.machine.decide import Place
from flash_ladder.schema import TrainerConfig


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning sets it on the function


def devices_and_strategy(cfg: TrainerConfig, place: Place) -> dict[str, Any]:
    """The trainer's arguments for devices and strategy. trainer.strategy=auto is DDP where there are several devices."""
    alone = place.n_devices == 1 and cfg.strategy == "auto"
    return {
        "accelerator": "cuda" if place.device.type == "cuda" else "cpu",
        "devices": place.n_devices,
        "strategy": "auto" if alone else DDPStrategy(gradient_as_bucket_view=True),
    }
