"""Which keys a query sees, one interval per row, and how far away they are.

Causality, a sliding window and packed documents are all the same idea. Query i sees the keys j with lo_i <= j <= hi_i. Eager
attention and SDPA make their masks from these two numbers. The kernels compute the same numbers where they need them
(`documents.py`, `tile_ops.interval`).
"""

import torch
from torch import Tensor

from .asked import Asked


def key_bounds(asked: Asked, seq_q: int, seq_k: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """First and last key that each query sees, int64 [1, Sq] (or [B, Sq] with documents); lo > hi means none.

    Positions align bottom-right: query i stands at key position i + Sk - Sq (FlashAttention 2.1 and later).
    `asked.document_ids` is [B, S], non-decreasing, and needs Sq == Sk.
    """
    position = torch.arange(seq_q, device=device)[None] + (seq_k - seq_q)
    lo = torch.zeros_like(position)
    hi = position if asked.is_causal else torch.full_like(position, seq_k - 1)
    if asked.window_size is not None:
        lo = torch.maximum(lo, position - (asked.window_size - 1))
        hi = torch.minimum(hi, position + (asked.window_size - 1))
    if asked.document_ids is not None:
        first, last = document_bounds(asked.document_ids)
        lo = torch.maximum(lo, first)
        hi = torch.minimum(hi, last)
    return lo, torch.minimum(hi, torch.full_like(hi, seq_k - 1))


def document_bounds(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """First and last position of the document that each position belongs to, int32 [B, S]; ids [B, S] are non-decreasing."""
    ids = document_ids.contiguous()
    return torch.searchsorted(ids, ids, out_int32=True), torch.searchsorted(ids, ids, right=True, out_int32=True) - 1


def visible(lo: Tensor, hi: Tensor, seq_k: int) -> Tensor:
    """The bounds as a boolean mask [1 or B, 1, Sq, Sk], True where query i sees key j."""
    key = torch.arange(seq_k, device=lo.device)
    return ((key >= lo[..., None]) & (key <= hi[..., None]))[:, None]


def distance(seq_q: int, seq_k: int, device: torch.device) -> Tensor:
    """|i − j| with i aligned bottom-right, int64 [Sq, Sk]."""
    position = torch.arange(seq_q, device=device) + (seq_k - seq_q)
    return (position[:, None] - torch.arange(seq_k, device=device)).abs()
