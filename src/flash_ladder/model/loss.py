"""The loss: cross-entropy in nats of the token that follows each position, computed in float32.

`mean_loss` is what training minimises. `token_losses` gives the same loss token by token, for evaluation. The logits stay in
the precision they come in and become float32 probabilities a chunk at a time, so that a window of 32k tokens with a vocabulary of
50k needs little more memory than its logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that is left out of the mean
CHUNK_ELEMENTS = 2**24  # logits per chunk: 64 MiB of float32 probabilities (malloc would keep, and scatter, blocks of 16 MiB)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, float32 scalar, from logits [B, S, V] and targets int64 [B, S]; nan where every target is IGNORED."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, float32 [B, S], from logits [B, S, V] and targets [B, S]."""
    pieces = (F.cross_entropy(part.float(), wanted[:, 0], reduction="none") for part, wanted in chunks(logits, targets[..., None]))
    return torch.cat(list(pieces)).view(targets.shape)


def chunks(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [B, S, ...] cut along B · S, so that pieces of the first one have at most CHUNK_ELEMENTS."""
    size = max(1, CHUNK_ELEMENTS // rows[0].shape[-1])
    return zip(*(r.flatten(0, 1).split(size) for r in rows), strict=True)
