"""Memory layouts of attention's tensors."""

import torch
from torch import Tensor


def heads_last(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of x's shape [B, H, S, D], in memory [B, S, H, D]: merging the heads afterwards costs no copy."""
    _, heads, seq, head_dim = x.shape
    return x.new_empty_strided(x.shape, (seq * heads * head_dim, head_dim, heads * head_dim, 1), dtype=dtype or x.dtype)
