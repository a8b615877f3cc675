"""How a run is spread over devices: one process alone, or one a device, which hold the weights each (DDP) or a share (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from flash_ladder.machine.decide import Place
from flash_ladder.processes import Processes
from flash_ladder.schema import TrainerConfig
from flash_ladder.training import sharding


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning sets it on the function


def devices_and_strategy(cfg: TrainerConfig, place: Place, processes: Processes | None) -> dict[str, Any]:
    """The trainer's arguments for devices and strategy. trainer.strategy=auto is DDP where there are several devices.

    processes: those of the run, which training.ranks has started and joined; None for one process alone.
    """
    strategy: Any = "auto"
    if processes is not None:
        if cfg.strategy == "fsdp":
            strategy = ShardedStrategy(processes.n)
            strategy.cluster_environment = Started(processes)
        elif cfg.strategy == "ddp" or processes.n > 1:
            strategy = DDPStrategy(gradient_as_bucket_view=True, cluster_environment=Started(processes))
    return {
        "accelerator": "cuda" if place.device.type == "cuda" else "cpu",
        "devices": place.n_devices // place.n_nodes,
        "num_nodes": place.n_nodes,
        "strategy": strategy,
    }


class Started(ClusterEnvironment):
    """Tells Lightning of processes that have been started and have a process group."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    creates_processes_externally = True

    @property
    def main_address(self) -> str:
        return self.processes.address

    @property
    def main_port(self) -> int:
        return self.processes.port

    @staticmethod
    def detect() -> bool:
        return False  # Lightning is told, and need not look

    def world_size(self) -> int:
        return self.processes.n

    def set_world_size(self, size: int) -> None:
        """It is what it is."""

    def global_rank(self) -> int:
        return self.processes.rank

    def set_global_rank(self, rank: int) -> None:
        """It is what it is."""

    def local_rank(self) -> int:
        return self.processes.local_rank

    def node_rank(self) -> int:
        return self.processes.node


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices. Its checkpoints are one file, written and read by the trainer's CheckpointIO, as DDP's are.

    Lightning's own reader numbers the optimiser's parameters in the model's order, where ours are grouped by weight decay.
    """

    def __init__(self, n_devices: int) -> None:
        super().__init__(data_parallel_size=n_devices, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        sharding.load_weights(self.model, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            sharding.load_optimizer_state(self.model, optimizer, state)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        assert self.model is not None
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return sharding.optimizer_state(self.model, inner)
