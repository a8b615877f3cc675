"""flash_ladder.processes, and what pick_devices makes of them: who started how many, and what contradicts that."""

import pytest
import torch

from flash_ladder.errors import UserError
from flash_ladder.machine.decide import pick_devices
from flash_ladder.processes import PARENT, Processes, first_host, started
from flash_ladder.schema import TrainerConfig

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "29"}
SRUN = {
    **{"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
    **{"SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "123456"},
}


def test_alone_unless_something_says_otherwise():
    assert started({}) is None
    # A job's script and salloc's shell: many tasks were asked for, and one process runs.
    assert started({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_torchrun():
    found = started(TORCHRUN)
    assert found == Processes("torchrun", 5, 1, 4, 2, "a", 29)
    assert (found.n, found.node) == (8, 1)


def test_srun():
    found = started(SRUN)
    assert found == Processes("srun", 3, 1, 2, 2, "gpu07", 15000 + 3456)
    assert started(SRUN | {"MASTER_ADDR": "b", "MASTER_PORT": "7"}).address == "b"


def test_torchrun_inside_srun_is_torchrun():
    assert started(SRUN | TORCHRUN).by == "torchrun"


def test_a_process_that_another_one_started_knows_what_it_was_told():
    first = Processes("train.py", 0, 0, 2, 1, "127.0.0.1", 4321)
    told = first.environment(1)
    assert started(told) == Processes("train.py", 1, 1, 2, 1, "127.0.0.1", 4321)
    assert int(told[PARENT]) > 0


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "no LOCAL_RANK: start the processes with torchrun"),
        (TORCHRUN | {"WORLD_SIZE": "7"}, "7 processes are not equally many on every node"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "5"}, "5 processes are not equally many"),
    ],
)
def test_what_cannot_be_a_run(environ, message):
    with pytest.raises(UserError, match=message):
        started(environ)


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu[003-005,9],cpu1", "gpu003"), ("n1,n2", "n1"), ("n1", "n1"), ("n[7]", "n7"), ("n-a[2,3]", "n-a2")]
)
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize("asked", [{}, {"devices": "auto"}, {"devices": 4}, {"devices": 4, "num_nodes": 2}])
def test_the_processes_decide(asked):
    there = pick_devices(TrainerConfig(accelerator="cpu", **asked), started(TORCHRUN))
    assert there == (torch.device("cpu"), 4, 2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"devices": 8}, "trainer.devices=8, but torchrun started 8 processes, 4 on each of 2 nodes"),
        ({"num_nodes": 1}, "trainer.num_nodes=1, but torchrun"),
    ],
)
def test_a_contradiction_is_refused(asked, message):
    with pytest.raises(UserError, match=message):
        pick_devices(TrainerConfig(accelerator="cpu", **asked), started(TORCHRUN))


def test_one_process_starts_none_on_other_nodes():
    with pytest.raises(UserError, match=r"trainer\.num_nodes=2: one process cannot start those of other nodes"):
        pick_devices(TrainerConfig(accelerator="cpu", num_nodes=2))


def test_processes_that_see_too_few_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="PyTorch finds 1 GPU: start one a GPU, and let every process see all"):
        pick_devices(TrainerConfig(), started(TORCHRUN))
