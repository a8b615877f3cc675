"""Where a command runs: devices, precision and attention, decided with their reasons or refused."""

from dataclasses import replace

import pytest
import torch

from flash_ladder.errors import UserError
from flash_ladder.kernels import Choice
from flash_ladder.machine.decide import DTYPES, PRECISIONS, decide, pick_backend, pick_device, pick_devices, pick_precision
from flash_ladder.measure.flops import peak_tflops
from flash_ladder.model_schema import ModelConfig
from flash_ladder.processes import Processes
from flash_ladder.schema import TrainerConfig
from tests.helpers.tiny import tiny_config

CPU = torch.device("cpu")


def test_precision_follows_the_device_and_says_why(monkeypatch):
    gpu = torch.device("cuda")
    assert pick_precision("auto", CPU) == ("32", "a CPU")
    for capability, precision in (((9, 0), "bf16-mixed"), ((8, 0), "bf16-mixed"), ((7, 5), "16-mixed"), ((7, 0), "32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert pick_precision("auto", gpu)[0] == precision
    assert pick_precision("bf16-mixed", CPU) == ("bf16-mixed", "asked for")
    with pytest.raises(UserError, match="16-mixed needs a GPU"):
        pick_precision("16-mixed", CPU)


def test_devices_are_counted_or_refused(monkeypatch):
    assert pick_devices(TrainerConfig(devices="auto", accelerator="cpu")) == (CPU, 1, 1)
    assert pick_devices(TrainerConfig(devices=2, accelerator="cpu")) == (CPU, 2, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch finds no GPU here"):
        pick_devices(TrainerConfig(accelerator="gpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_devices(TrainerConfig(devices=-1)) == (torch.device("cuda", 0), 4, 1)
    with pytest.raises(UserError, match="finds 4 GPUs here"):
        pick_devices(TrainerConfig(devices=8))


def test_devices_are_groups_that_share_a_sequence(monkeypatch):
    assert pick_devices(TrainerConfig(context_parallel=3, accelerator="cpu")) == (CPU, 3, 1)
    assert pick_devices(TrainerConfig(context_parallel=2, devices=6, accelerator="cpu")) == (CPU, 6, 1)
    with pytest.raises(UserError, match="6 devices cannot be cut into groups of 4 that share a sequence; 8 could"):
        pick_devices(TrainerConfig(context_parallel=4, devices=6, accelerator="cpu"))
    two_nodes = Processes("torchrun", 5, 2, 3, 2, "a", 1)
    assert pick_devices(TrainerConfig(context_parallel=2, accelerator="cpu"), two_nodes) == (CPU, 3, 2)
    with pytest.raises(UserError, match="context_parallel=4: 6 devices"):
        pick_devices(TrainerConfig(context_parallel=4, accelerator="cpu"), two_nodes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="context_parallel=8: PyTorch finds 4 GPUs here"):
        pick_devices(TrainerConfig(context_parallel=8))


def test_eagers_output_is_nothing_to_keep(tmp_path):
    cfg = tiny_config(tmp_path, activation_checkpointing="keep_attention")
    assert decide(cfg).attention.backend == "sdpa"
    with pytest.raises(UserError, match=r"keep_attention has nothing to keep with attention=eager"):
        decide(replace(cfg, attention=replace(cfg.attention, backend="eager")))


def test_deterministic_training_on_hopper_takes_a_rung_that_is(tmp_path, monkeypatch):
    """And PyTorch's own attention, which the switch that Lightning turns makes so, stays there for who names it."""

    class Properties:
        major, minor, name = 9, 0, "NVIDIA H200"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def chosen(backend: str, deterministic: bool) -> Choice:
        cfg = tiny_config(tmp_path, deterministic=deterministic, accelerator="gpu", precision="bf16-mixed")
        return decide(replace(cfg, attention=replace(cfg.attention, backend=backend))).attention

    assert chosen("auto", False).backend == chosen("flash_v3", False).backend == "flash_v3"
    assert chosen("auto", True).backend == chosen("flash_v3", True).backend == "flash_v3"
    assert chosen("sdpa", True).backend == "sdpa"


def test_devices():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "meta", "cuda:99"):
        with pytest.raises(UserError, match=f"device={name}"):
            pick_device(name)


def test_backends():
    cfg, cpu = ModelConfig(d_model=64, n_head=4), torch.device("cpu")
    assert pick_backend("auto", cfg, cpu, "32").backend == "sdpa"
    assert pick_backend("eager", cfg, cpu, "bf16-mixed").backend == "eager"
    with pytest.raises(UserError, match="flash_v2 takes head_dim 16 to 256, not 8; eager and sdpa can"):
        pick_backend("flash_v2", ModelConfig(d_model=32, n_head=4), cpu, "32")
    assert pick_backend("flash_v2", cfg, cpu, "32", documents=True).backend == "flash_v2"
    capped = replace(cfg, softcap=50.0, window_size=8)
    assert pick_backend("auto", capped, cpu, "32").backend == "eager"
    with pytest.raises(UserError, match=r"has no softcap; eager"):
        pick_backend("sdpa", capped, cpu, "32")
    assert pick_backend("sdpa", replace(cfg, position="alibi", window_size=8), cpu, "32").backend == "sdpa"


def test_a_dtypes_precision_is_the_way_back():
    assert {getattr(torch, name): precision for name, precision in PRECISIONS.items()} == {d: p for p, d in DTYPES.items()}
    assert all(peak_tflops("NVIDIA H200", precision) for precision in PRECISIONS.values())
