"""Attention kernels: one operation on several backends. Needs torch, and triton for the flash rungs; usable alone."""

from . import jit  # isort: skip  (settles how Triton runs, so it comes before whatever imports Triton)

from .choice import BACKENDS, Choice, Unsupported, choose
from .operation import attention

__all__ = ["BACKENDS", "Choice", "Unsupported", "attention", "choose", "jit"]
