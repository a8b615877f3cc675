"""Memory layouts of attention's tensors."""

import torch
from torch import Tensor


def heads_last(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of x's shape [B, H, S, D], in memory [B, S, H, D]: merging the heads afterwards costs no copy."""
    batch, heads, seq, head_dim = x.shape
    return x.new_empty((batch, seq, heads, head_dim), dtype=dtype or x.dtype).transpose(1, 2)
