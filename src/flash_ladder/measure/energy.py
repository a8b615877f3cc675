"""The energy that a GPU has taken, as its own counter says."""

from __future__ import annotations

import math

import torch


class EnergyCounter:
    """Joules that `device` has taken since its driver was loaded; nan where nothing counts them.

    NVML counts from Volta on, for the whole board: also what other processes have it do. A CPU, a slice of a GPU (MIG) and a
    machine without the package nvidia-ml-py give nan.
    """

    def __init__(self, device: torch.device) -> None:
        self.handle = _handle(device)

    def joules(self) -> float:
        """The counter now."""
        if self.handle is None:
            return math.nan
        import pynvml

        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3  # NVML counts in millijoules
        except pynvml.NVMLError:
            self.handle = None
            return math.nan


def _handle(device: torch.device) -> object | None:
    """NVML's name for `device`; None where there is none."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # CUDA numbers the GPUs that it may see, and NVML all of them. The UUID is the same for both.
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None
