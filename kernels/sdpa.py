"""PyTorch's F.scaled_dot_product_attention: the peer that every rung is measured against, and what runs where no rung can.

PyTorch picks among its own flash, cuDNN, memory-efficient and math backends. Two meanings differ from ours and are translated
here: its causal mask aligns top-left when Sq != Sk, and a row that sees no key comes out as NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .bounds import key_bounds, visible
from .eager import distance

FEATURES = frozenset({"is_causal", "window_size", "alibi_slopes", "document_ids"})


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, features: frozenset[str]) -> str | None:
    """Why PyTorch's operation cannot do this, or None."""
    deterministic = device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    available = FEATURES | {"deterministic"} if deterministic else FEATURES
    missing = sorted(features - available)
    return f"F.scaled_dot_product_attention has no {' and no '.join(missing)}" if missing else None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    window_size: int | None = None,
    alibi_slopes: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, None]:
    """Attention by PyTorch's operation; arguments as in `kernels.attention`, whose checks have passed.

    Returns the output [B, Hq, Sq, D] and None. A window, documents, ALiBi and causal masks with Sq != Sk are passed as an
    explicit mask, which costs O(Sq·Sk) memory and keeps PyTorch from its flash backend.
    """
    seq_q, seq_k = query.shape[2], key.shape[2]
    options = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    plain = window_size is None and alibi_slopes is None and document_ids is None
    if plain and (not is_causal or seq_q == seq_k):
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, **options), None
    if plain and seq_q == 1 and seq_k > 0:  # decoding: the last position sees everything
        return F.scaled_dot_product_attention(query, key, value, **options), None

    bounds = key_bounds(seq_q, seq_k, is_causal=is_causal, window_size=window_size, document_ids=document_ids, device=query.device)
    mask = visible(*bounds, seq_k)
    blind = ~mask.any(-1, keepdim=True)
    mask = mask | blind
    if alibi_slopes is not None:
        bias = -alibi_slopes[:, None, None] * distance(seq_q, seq_k, query.device)
        mask = bias.masked_fill(~mask, -torch.inf).to(query.dtype)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    return output.masked_fill(blind, 0.0), None
