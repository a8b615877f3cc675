"""Cross-entropy of rows of logits, and its gradient written over them, in one Triton kernel.

The logits of a vocabulary are the largest tensor of a training step: 6 GiB of bfloat16 for 65,536 tokens of GPT-2. As separate
operations the loss and its gradient pass over them five times and more, in float32. Here they are read twice, the second time from
the L2 cache, and written once in their own dtype. The softmax's normaliser is kept up to date block by block (Milakov and
Gimelshein, 2018, https://arxiv.org/abs/1805.02867, Algorithm 3).
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import launching
from .jit import INTERPRET
from .launch import on, readable_cache_errors
from .tile_ops import round_to

BLOCK = 8192  # logits that a program holds at a time, in float32: 16 registers of each of its 512 threads
WARPS = 16


def losses_and_gradient(logits: Tensor, targets: Tensor, ignored: int, *, differentiate: bool) -> Tensor:
    """The cross-entropy of each row in nats, float32 [N]; 0 where the target is `ignored`.

    logits: [N, V], rows contiguous. Where `differentiate`, the gradient of the losses' sum takes their place: softmax(logits), less
    1 at the target, rounded once; 0 in a row that is ignored. targets: int64 [N]; the loss of one outside [0, V) is nan.
    """
    losses = torch.empty(len(logits), device=logits.device, dtype=torch.float32)
    if len(logits):
        with on(logits.device), readable_cache_errors(), launching() if INTERPRET else nullcontext():
            _kernel[(len(logits),)](
                logits, targets, losses, logits.stride(0), logits.shape[1], ignored, differentiate, BLOCK, num_warps=WARPS
            )
    return losses


@triton.jit
def _kernel(LOGITS, TARGETS, LOSSES, stride, n_logit, ignored, DIFFERENTIATE: tl.constexpr, BLOCK: tl.constexpr):
    """A program owns one row. It loops over blocks of the row twice: for the log-sum-exp, and for the gradient. Its registers hold
    one block in float32; it uses no shared memory but for the sums over its threads."""
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * stride
    target = tl.load(TARGETS + row)
    counts = target != ignored
    cols = tl.arange(0, BLOCK)

    highest, total = -float("inf"), 0.0
    for first in range(0, n_logit, BLOCK):
        x = tl.load(logits + first + cols, mask=first + cols < n_logit, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # a block of -inf alone must not give inf - inf
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(x - shift), 0)
        highest = higher
    lse = highest + tl.log(total)

    wanted = tl.load(logits + target, mask=(target >= 0) & (target < n_logit), other=float("nan")).to(tl.float32)
    tl.store(LOSSES + row, tl.where(counts, lse - wanted, 0.0))
    if DIFFERENTIATE:
        tl.debug_barrier()  # every thread has read the target's logit before any writes
        for first in range(0, n_logit, BLOCK):
            inside = first + cols < n_logit
            x = tl.load(logits + first + cols, mask=inside, other=-float("inf")).to(tl.float32)
            p = tl.exp(x - lse)
            gradient = tl.where(counts, tl.where(first + cols == target, p - 1.0, p), 0.0)
            tl.store(logits + first + cols, round_to(gradient, LOGITS.dtype.element_ty), mask=inside)
