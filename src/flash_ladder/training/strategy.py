"""How a run is spread over devices: one process alone, or one a device under DDP."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from flash_ladder.machine.decide import Place
from flash_ladder.schema import TrainerConfig


def devices_and_strategy(cfg: TrainerConfig, place: Place) -> dict[str, Any]:
    """The trainer's arguments for devices and strategy. trainer.strategy=auto is DDP where there are several devices."""
    alone = place.n_devices == 1 and cfg.strategy == "auto"
    return {
        "accelerator": "cuda" if place.device.type == "cuda" else "cpu",
        "devices": place.n_devices,
        "strategy": "auto" if alone else DDPStrategy(gradient_as_bucket_view=True),
    }
