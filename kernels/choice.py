"""Which backend runs a call of attention, and why.

A backend is a module, named in BACKENDS. It has `unsupported(device, dtype, head_dim, features)`, which gives the reason why it
cannot run a call, or None. A backend that is asked for by name is never replaced silently; "auto" takes the first of the GPU
generation's order that can run the call.
"""

from dataclasses import dataclass
from typing import Any

import torch

from . import eager, sdpa
from .asked import LARGEST_SCALE
from .generations import ELSEWHERE, describe, dtype_name, generation
from .jit import has_triton

# Modules; None for the rungs where Triton is not installed.
BACKENDS: dict[str, Any] = {"eager": eager, "sdpa": sdpa, "flash_v1": None, "flash_v2": None, "flash_v3": None}
if has_triton():  # a machine that only evaluates may have torch alone
    from . import flash_v1, flash_v2
    from .flash_v3 import launch as flash_v3

    BACKENDS |= {"flash_v1": flash_v1, "flash_v2": flash_v2, "flash_v3": flash_v3}


class Unsupported(ValueError):
    """The backend asked for by name cannot run this call. The message says why, and which backends can."""


@dataclass(frozen=True)
class Choice:
    """A backend and why it was chosen."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})"


def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    backend: str = "auto",
    features: frozenset[str] = frozenset({"is_causal"}),
) -> Choice:
    """The backend that will run, and the reason.

    Args:
        device, dtype, head_dim: of the query.
        backend: a name, or "auto" for the first in the generation's order that can run this.
        features: those of `kernels.asked.FEATURES` that the call uses ("is_causal", "window_size", "document_ids", ...).

    Raises:
        Unsupported: the named backend cannot run this.
    """
    where = f"{describe(device)}, {dtype_name(dtype)}, head_dim {head_dim}"
    if backend != "auto":
        reason = why_not(backend, device, dtype, head_dim, features)
        if reason is not None:
            able = [b for b in BACKENDS if b != backend and why_not(b, device, dtype, head_dim, features) is None]
            raise Unsupported(f"attention backend {backend} cannot run here: {reason}; {' and '.join(able)} can")
        return Choice(backend, f"asked for; {where}")
    here = generation(device)
    passed_over: list[str] = []
    for name in here.order if here else ELSEWHERE:
        reason = why_not(name, device, dtype, head_dim, features)
        if reason is None:
            because = [where] + ([here.brings] if here and name == here.order[0] else []) + passed_over
            return Choice(name, "; ".join(because))
        passed_over.append(f"not {name}: {reason}")
    raise Unsupported(f"no attention backend can run here: {'; '.join(passed_over)}")


def why_not(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, features: frozenset[str]) -> str | None:
    """Why `backend` cannot run this, or None where it can. Raises ValueError for a name that is no backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of auto, {', '.join(BACKENDS)}")
    module = BACKENDS[backend]
    if module is None:
        return "the package triton is not installed"
    if "huge_scale" in features and backend != "eager":
        return f"scores times more than {LARGEST_SCALE:g} lose all digits after the point in a fused kernel's float32"
    return module.unsupported(device, dtype, head_dim, features)
