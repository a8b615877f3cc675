"""Where a run happens: which device, in which precision, with which attention, each with its reason."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from flash_ladder.errors import UserError
from flash_ladder.kernels import Choice, Unsupported, choose
from flash_ladder.schema import Config, TrainerConfig

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32": torch.float32}


@dataclass(frozen=True)
class Place:
    """Where a run happens and in which arithmetic, each with its reason."""

    device: torch.device  # of this process
    n_devices: int
    precision: str
    precision_reason: str
    attention: Choice

    @property
    def dtype(self) -> torch.dtype:
        """What attention computes in."""
        return DTYPES[self.precision]


def find_place(cfg: Config) -> Place:
    """Decides device, precision and attention; raises UserError where what was asked for cannot run here."""
    device, n_devices = find_devices(cfg.trainer)
    precision, reason = find_precision(cfg.trainer.precision, device)
    features = {"is_causal", "document_ids"} if cfg.data.document_ids else {"is_causal"}
    if cfg.trainer.deterministic and cfg.attention.backend != "sdpa":  # sdpa follows PyTorch's own switch, which Lightning turns
        features.add("deterministic")
    try:
        choice = choose(device, DTYPES[precision], cfg.model.head_dim, backend=cfg.attention.backend, features=frozenset(features))
    except Unsupported as error:
        raise UserError(str(error)) from None
    return Place(device, n_devices, precision, reason, choice)


def find_devices(cfg: TrainerConfig) -> tuple[torch.device, int]:
    """This process's device, and how many of its kind take part."""
    has_gpu = torch.cuda.is_available()
    if cfg.accelerator == "gpu" and not has_gpu:
        raise UserError("trainer.accelerator=gpu: PyTorch finds no GPU here; trainer.accelerator=auto runs on the CPU")
    on_gpu = has_gpu and cfg.accelerator != "cpu"
    there = torch.cuda.device_count() if on_gpu else 1
    if cfg.devices in ("auto", "-1", -1):
        n_devices = there
    elif isinstance(cfg.devices, int):
        n_devices = cfg.devices
    else:
        raise UserError(f"trainer.devices={cfg.devices} must be a number, or auto; CUDA_VISIBLE_DEVICES picks which GPUs are seen")
    if on_gpu and n_devices > there:
        raise UserError(f"trainer.devices={n_devices}: PyTorch finds {there} GPU{'s' * (there > 1)} here; auto takes all there are")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # set for the processes that DDP starts
    return (torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")), n_devices


def find_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """The precision and why: bf16 from Ampere on, fp16 on Turing, which has no bf16, and float32 elsewhere."""
    if asked == "16-mixed" and device.type == "cpu":
        raise UserError("trainer.precision=16-mixed needs a GPU; on a CPU 32 and bf16-mixed work")
    if asked != "auto":
        return asked, "asked for"
    if device.type == "cpu":
        return "32", "a CPU"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return "bf16-mixed", "the GPU has bf16 tensor cores"
    if capability == (7, 5):
        return "16-mixed", "Turing has fp16 tensor cores and no bf16"
    return "32", "a GPU before Turing"
