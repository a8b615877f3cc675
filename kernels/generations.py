"""GPU generations: what each brings to attention, and which backend `auto` takes there."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Generation:
    """One generation of NVIDIA GPUs."""

    name: str
    capabilities: tuple[tuple[int, int], ...]
    brings: str  # what its best rung is built on
    order: tuple[str, ...]  # backends that `auto` tries, best first


GENERATIONS = (
    Generation("Turing", ((7, 5),), "fp16 tensor cores, 64 KB of shared memory", ("flash_v2", "sdpa", "eager")),
    Generation("Ampere", ((8, 0), (8, 6), (8, 7)), "bf16 tensor cores and asynchronous copies", ("flash_v2", "sdpa", "eager")),
    Generation("Ada", ((8, 9),), "bf16 tensor cores and asynchronous copies", ("flash_v2", "sdpa", "eager")),
    Generation("Hopper", ((9, 0),), "TMA and asynchronous wgmma tensor cores", ("flash_v3", "flash_v2", "sdpa", "eager")),
    Generation("Blackwell", ((10, 0), (10, 3)), "tcgen05 tensor cores", ("flash_v2", "sdpa", "eager")),
    Generation("Blackwell", ((12, 0), (12, 1)), "bf16 tensor cores and asynchronous copies", ("flash_v2", "sdpa", "eager")),
)
ELSEWHERE = ("sdpa", "eager")  # without a GPU, or with one that the table lacks: older, newer, another vendor's


def capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of an NVIDIA GPU; None for anything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def generation(device: torch.device) -> Generation | None:
    """The generation that `device` belongs to; None where the table has none."""
    found = capability(device)
    for entry in GENERATIONS:
        if found in entry.capabilities:
            return entry
    return None


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype in words: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def describe(device: torch.device) -> str:
    """A device in words: "NVIDIA H200, Hopper sm_90", "CPU"."""
    if device.type != "cuda":
        return device.type.upper() if device.type == "cpu" else device.type
    properties = torch.cuda.get_device_properties(device)
    entry = generation(device)
    return f"{properties.name}, {entry.name if entry else 'generation not in the table'} sm_{properties.major}{properties.minor}"
