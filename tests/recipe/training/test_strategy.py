"""flash_ladder.training.strategy: when a run is one process, and when it is one a device."""

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from flash_ladder.kernels import Choice
from flash_ladder.machine.decide import Place
from flash_ladder.processes import Processes
from flash_ladder.schema import TrainerConfig
from flash_ladder.training.strategy import ShardedStrategy, devices_and_strategy


@pytest.mark.parametrize(
    ("strategy", "n_devices", "n_nodes", "kind"),
    [("auto", 1, 1, None), ("auto", 2, 1, DDPStrategy), ("ddp", 1, 1, DDPStrategy), ("fsdp", 4, 2, ShardedStrategy)],
)
def test_ddp_where_there_are_several_devices_or_it_is_asked_for(strategy, n_devices, n_nodes, kind):
    place = Place(torch.device("cpu"), n_devices, "32", "a CPU", Choice("eager", "asked for"), n_nodes)
    processes = Processes("torchrun", n_devices - 1, 0, n_devices // n_nodes, n_nodes, "a", 1) if kind else None
    told = devices_and_strategy(TrainerConfig(strategy=strategy), place, processes)
    assert (told["accelerator"], told["devices"], told["num_nodes"]) == ("cpu", n_devices // n_nodes, n_nodes)
    if kind is None:
        assert told["strategy"] == "auto"
    else:
        assert isinstance(told["strategy"], kind)
        where = told["strategy"].cluster_environment
        assert (where.world_size(), where.global_rank(), where.node_rank()) == (n_devices, n_devices - 1, n_nodes - 1)
