"""What is asked of attention as tensors for the kernels: slopes, and where each position's document begins and ends.

Every call with document_ids needs these bounds, forward and backward. `kernels.bounds.document_bounds` finds them with three
PyTorch operations, which take 5 % of a forward pass at 16k tokens. Here one kernel finds them.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .asked import Asked
from .launch import Launch, on


@triton.jit
def bounds_kernel(IDS, FIRST, LAST, seq, n_block, steps, BLOCK: tl.constexpr):
    """One program: the bounds of BLOCK positions of one sequence, by a binary search before each position and one after it.

    Decreasing ids give useless bounds, but bounds within the sequence.
    """
    row = (tl.program_id(0) // n_block).to(tl.int64) * seq
    position = tl.program_id(0) % n_block * BLOCK + tl.arange(0, BLOCK)
    inside = position < seq
    own = tl.load(IDS + row + position, mask=inside, other=0)
    first_from, first_to = position * 0, tl.minimum(position, seq - 1)
    last_from, last_to = first_to, position * 0 + (seq - 1)
    for _ in range(steps):
        before = (first_from + first_to) // 2
        after = (last_from + last_to + 1) // 2
        is_other = tl.load(IDS + row + before) < own
        is_own = tl.load(IDS + row + after) <= own
        first_from = tl.where(is_other, before + 1, first_from)
        first_to = tl.where(is_other, first_to, before)
        last_from = tl.where(is_own, after, last_from)
        last_to = tl.where(is_own, last_to, after - 1)
    tl.store(FIRST + row + position, first_from, mask=inside)
    tl.store(LAST + row + position, last_to, mask=inside)


def tensors_for_kernels(asked: Asked, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """First and last position of each position's document, int32 [B, S], and slopes, float32 [Hq]; None for what is not asked."""
    first, last = (None, None) if asked.document_ids is None else document_ends(asked.document_ids)
    slopes = None if asked.alibi_slopes is None else asked.alibi_slopes.to(device, torch.float32).contiguous()
    return first, last, slopes


def document_ends(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """First and last position of the document that each position belongs to, int32 [B, S]; ids [B, S] are non-decreasing."""
    ids = document_ids.contiguous()
    first, last = (torch.empty(ids.shape, device=ids.device, dtype=torch.int32) for _ in range(2))
    if ids.numel():
        with on(ids.device):
            prepare_ends(ids.device, ids.dtype, *ids.shape)(ids, first, last)
    return first, last


@lru_cache(maxsize=4096)
def prepare_ends(device: torch.device, dtype: torch.dtype, batch: int, seq: int) -> Launch:
    """The launch of `document_ends` for all ids of one shape, cached."""
    block = 256
    n_block = triton.cdiv(seq, block)
    return Launch(bounds_kernel, (batch * n_block, 1, 1), device, (seq, n_block, seq.bit_length(), block), {"num_warps": 4})
