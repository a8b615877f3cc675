"""PyTorch's F.scaled_dot_product_attention: the peer that every rung is measured against, and what runs where no rung can.

PyTorch picks among its own flash, cuDNN, memory-efficient and math backends. Two meanings differ from ours and are translated
here: its causal mask aligns top-left when Sq != Sk, and a row that sees no key comes out as NaN.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .asked import Asked
from .bounds import distance, key_bounds, visible

FEATURES = frozenset({"is_causal", "window_size", "alibi_slopes", "document_ids"})


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, features: frozenset[str]) -> str | None:
    """Why PyTorch's operation cannot do this, or None."""
    deterministic = device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    available = FEATURES | {"deterministic"} if deterministic else FEATURES
    missing = sorted(features - available)
    return f"F.scaled_dot_product_attention has no {' and no '.join(missing)}" if missing else None


def attend(query: Tensor, key: Tensor, value: Tensor, asked: Asked) -> tuple[Tensor, None]:
    """Attention by PyTorch's operation; `attention` has checked what is asked.

    Returns the output [B, Hq, Sq, D] and None. A window, documents, ALiBi and causal masks with Sq != Sk are passed as an
    explicit mask, which costs O(Sq·Sk) memory and keeps PyTorch from its flash backend.
    """
    seq_q, seq_k = query.shape[2], key.shape[2]
    options: dict[str, Any] = {"scale": asked.scale}
    if query.shape[1] != key.shape[1]:  # a branch, as the comparison of symbolic sizes is no bool
        options["enable_gqa"] = True
    plain = asked.window_size is None and asked.alibi_slopes is None and asked.document_ids is None
    if plain and (not asked.is_causal or seq_q == seq_k):
        return F.scaled_dot_product_attention(query, key, value, is_causal=asked.is_causal, **options), None
    if plain and seq_q == 1 and seq_k > 0:  # decoding: the last position sees everything
        return F.scaled_dot_product_attention(query, key, value, **options), None

    mask = visible(*key_bounds(asked, seq_q, seq_k, query.device), seq_k)
    blind = ~mask.any(-1, keepdim=True)
    mask = mask | blind
    if asked.alibi_slopes is not None:
        # A constant added to a row changes no probability. With the nearest key at 0, the bias keeps its digits in half precision.
        wide = torch.promote_types(query.dtype, torch.float32)
        bias = -asked.alibi_slopes.to(wide)[:, None, None] * distance(seq_q, seq_k, query.device)
        bias = bias.masked_fill(~mask, -torch.inf)
        mask = (bias - bias.amax(-1, keepdim=True)).to(query.dtype)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    return output.masked_fill(blind, 0.0), None
