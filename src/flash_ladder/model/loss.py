"""The loss: cross-entropy in nats of the token that follows each position, computed in float32.

`mean_loss` is what training minimises. `token_losses` are the same token by token, for evaluation: logits stay in the precision
they come in and turn into float32 probabilities a chunk at a time, so that a window of 32k tokens and a vocabulary of 50k need
little more than its logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that is left out of the mean
CHUNK_ELEMENTS = 2**24  # logits that become probabilities at once: 64 MiB in float32 (malloc would keep, and scatter, 16 MiB ones)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, float32 scalar, from logits [B, S, V] and targets int64 [B, S]; nan where every target is IGNORED."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, float32 [B, S], from logits [B, S, V] and targets [B, S]."""
    pieces = (F.cross_entropy(part.float(), wanted[:, 0], reduction="none") for part, wanted in chunks(logits, targets[..., None]))
    return torch.cat(list(pieces)).view(targets.shape)


def chunks(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [B, S, ...] cut along B · S, into pieces of the first of at most CHUNK_ELEMENTS."""
    size = max(1, CHUNK_ELEMENTS // rows[0].shape[-1])
    return zip(*(r.flatten(0, 1).split(size) for r in rows), strict=True)
