"""The loss: cross-entropy in nats of the token that follows each position, computed in float32.

`mean_loss` is what training minimises, and `mean_loss_in_pieces` the same without ever holding all logits, which a long sequence
has no room for. `token_losses` gives the loss token by token, for evaluation. The logits stay in the precision they come in and
become float32 probabilities a chunk at a time, so that a window of 32k tokens with a vocabulary of 50k needs little more memory
than its logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_ladder.kernels.jit import has_triton

IGNORED = -100  # a target that is left out of the mean
CHUNK_ELEMENTS = 2**24  # logits per chunk: 64 MiB of float32 probabilities (malloc would keep, and scatter, blocks of 16 MiB)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, float32 scalar, from logits [B, S, V] and targets int64 [B, S]; nan where every target is IGNORED."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, float32 [B, S], from logits [B, S, V] and targets [B, S]; float64 from float64 logits."""
    dtype = wide(logits.dtype)
    pieces = (
        F.cross_entropy(part.to(dtype), wanted[:, 0], reduction="none") for part, wanted in chunks(logits, targets[..., None])
    )
    return torch.cat(list(pieces)).view(targets.shape)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits of `dtype` become probabilities: float32, or float64 where they are that."""
    return torch.promote_types(dtype, torch.float32)


def chunks(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [B, S, ...] cut along B · S, so that pieces of the first one have at most CHUNK_ELEMENTS."""
    size = max(1, CHUNK_ELEMENTS // rows[0].shape[-1])
    return zip(*(r.flatten(0, 1).split(size) for r in rows), strict=True)


# ---- the loss in pieces ----


def mean_loss_in_pieces(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
    """`mean_loss(F.linear(hidden, weight), targets)` with the logits of `rows` positions at a time, also under autocast.

    hidden [B, S, E], weight [V, E], targets int64 [B, S] -> float32 scalar. What is left for the backward is one gradient as large
    as `hidden` and one as large as `weight`: 262,144 positions of a vocabulary of 50k need 1 GiB, where their logits would take 49
    in float32, three times over.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    wanted = targets.flatten()
    with torch.autocast(kind, enabled=False):
        total, _, _ = loss_in_pieces(hidden.flatten(0, 1), weight, wanted, rows, dtype, torch.is_grad_enabled())
    return total / (wanted != IGNORED).sum()


# A piece's gradients are made with its logits, in their place, so that nothing of it outlives it. They are added up in float32:
# checkpointed pieces of F.linear would be shorter to write, but autocast adds the weight's gradient up in bf16, once a piece, which
# loses digits. As a torch operator it passes through torch.compile in one graph. PyTorch has F.linear_cross_entropy from 2.13 on,
# which does the same in its own operations; this recipe runs on 2.11.
@torch.library.custom_op("flash_ladder::loss_in_pieces", mutates_args=())
def loss_in_pieces(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, dtype: torch.dtype, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses, float32 scalar, and its gradients of hidden [N, E] and weight [V, E]; empty unless `differentiate`.

    targets: int64 [N]. dtype: of the products, and of hidden's gradient; weight's has weight's own.
    """
    words = weight.to(dtype)
    total = torch.zeros((), device=hidden.device, dtype=torch.float32)
    grad_hidden = hidden.new_empty(hidden.shape if differentiate else 0, dtype=dtype)
    grad_weight = torch.zeros(weight.shape if differentiate else 0, device=weight.device, dtype=torch.float32)
    buffer = hidden.new_empty((min(rows, len(hidden)), len(weight)), dtype=dtype)
    for start in range(0, len(hidden), rows):
        part, wanted = hidden[start : start + rows].to(dtype), targets[start : start + rows]
        logits = torch.mm(part, words.T, out=buffer[: len(part)])
        total += losses_and_gradient(logits, wanted, differentiate).sum()
        if differentiate:  # the logits hold their gradient
            torch.mm(logits, words, out=grad_hidden[start : start + rows])
            add_product(grad_weight, logits.T, part)
    return total, grad_hidden, grad_weight.to(weight.dtype)


def losses_and_gradient(logits: Tensor, targets: Tensor, differentiate: bool) -> Tensor:
    """The loss of each row, float32 [N]. The gradient of their sum takes the place of the logits [N, V] where it is asked for.

    One kernel on a GPU (kernels.cross_entropy), and the same in PyTorch's operations elsewhere.
    """
    if logits.is_cuda and has_triton():
        from flash_ladder.kernels import cross_entropy

        return cross_entropy.losses_and_gradient(logits, targets, IGNORED, differentiate=differentiate)
    scores, counts = logits.float(), (targets != IGNORED)[:, None]
    wanted = targets[:, None].where(counts, 0)
    lse = scores.logsumexp(1, keepdim=True)
    losses = ((lse - scores.gather(1, wanted)) * counts)[:, 0]
    if differentiate:
        probabilities = scores.sub_(lse).exp_()
        logits.copy_(probabilities.scatter_add_(1, wanted, torch.full_like(lse, -1.0)).mul_(counts))
    return losses


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with `total` in float32. A GPU's product of two bf16 matrices adds to it before any rounding."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total += a @ b


@loss_in_pieces.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, dtype: torch.dtype, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_hidden = hidden.new_empty(hidden.shape if differentiate else 0, dtype=dtype)
    return hidden.new_empty((), dtype=torch.float32), grad_hidden, weight.new_empty(weight.shape if differentiate else 0)


def _save_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[0].dtype


def _scale_gradients(ctx: Any, grad_total: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_weight = ctx.saved_tensors
    return grad_hidden.to(ctx.dtype) * grad_total, grad_weight * grad_total, None, None, None, None


loss_in_pieces.register_autograd(_scale_gradients, setup_context=_save_gradients)


def perplexity(loss: float) -> float:
    """exp(loss), inf where that overflows."""
    return math.exp(loss) if not loss > 700 else math.inf
