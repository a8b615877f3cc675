"""flash_ladder.training.strategy: when a run is one process, and when it is one a device."""

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from flash_ladder.kernels import Choice
from flash_ladder.machine.decide import Place
from flash_ladder.schema import TrainerConfig
from flash_ladder.training.strategy import devices_and_strategy


@pytest.mark.parametrize(("strategy", "n_devices", "ddp"), [("auto", 1, False), ("auto", 2, True), ("ddp", 1, True)])
def test_ddp_where_there_are_several_devices_or_it_is_asked_for(strategy, n_devices, ddp):
    place = Place(torch.device("cpu"), n_devices, "32", "a CPU", Choice("eager", "asked for"))
    told = devices_and_strategy(TrainerConfig(strategy=strategy), place)
    assert (told["accelerator"], told["devices"]) == ("cpu", n_devices)
    assert isinstance(told["strategy"], DDPStrategy) if ddp else told["strategy"] == "auto"
