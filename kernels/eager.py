"""Eager attention: the definition, and the reference for every other backend.

softmax(Q Kᵀ · scale + mask) V with the scores stored: O(Sq·Sk) memory, four passes over it in the forward alone (Vaswani et al.,
2017, section 3.2.1). Products run in the inputs' dtype and the softmax in float32 (float64 for float64 inputs), as in a model file
without a fused kernel.
"""

import torch
from torch import Tensor

from .asked import Asked
from .bounds import distance, key_bounds, visible


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, features: frozenset[str]) -> str | None:
    """Eager attention takes everything."""
    return None


def _scores(query: Tensor, key: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
    """Scores [B, Hq, Sq, Sk] in the accumulation dtype, -inf where hidden, and which rows see nothing [., 1, Sq, 1].

    Rows that see nothing are left unmasked, so that no NaN arises; the caller sets their results.
    """
    seq_q, seq_k = query.shape[2], key.shape[2]
    hidden = ~visible(*key_bounds(asked, seq_q, seq_k, query.device), seq_k)
    blind = hidden.all(-1, keepdim=True)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = scaled_product(query, key, asked.scale) if query.dtype == torch.float16 else (query @ key.mT).to(wide) * asked.scale
    if asked.softcap is not None:
        scores = asked.softcap * torch.tanh(scores / asked.softcap)
    if asked.alibi_slopes is not None:
        scores = scores - asked.alibi_slopes.to(scores.dtype)[:, None, None] * distance(seq_q, seq_k, query.device)
    return scores.masked_fill(hidden & ~blind, -torch.inf), blind


def scaled_product(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Q Kᵀ · scale of float16 inputs, as float32 [B, H, Sq, Sk].

    float16 ends at 65504, which a raw product soon passes. So the product is scaled before it is rounded. A scaled score beyond
    that takes all probability or none; it is set to the largest, so that none becomes infinite.
    """
    batch, n_head, seq_q, _ = query.shape
    nothing = query.new_zeros(1, 1, 1)
    product = torch.baddbmm(nothing, query.flatten(0, 1), key.flatten(0, 1).mT, beta=0, alpha=scale)
    largest = torch.finfo(query.dtype).max
    return product.clamp(-largest, largest).float().view(batch, n_head, seq_q, key.shape[2])


def _repeat_heads(query: Tensor, *shared: Tensor) -> list[Tensor]:
    """Key/value heads repeated so that each query head has its own."""
    group = query.shape[1] // shared[0].shape[1]
    return [x.repeat_interleave(group, 1) if group > 1 else x for x in shared]


def attend(query: Tensor, key: Tensor, value: Tensor, asked: Asked) -> tuple[Tensor, Tensor | None]:
    """Attention that torch differentiates by itself; `attention` has checked what is asked.

    Returns the output [B, Hq, Sq, D] and, if asked for, the log-sum-exp of each row's scores [B, Hq, Sq] (natural log).
    """
    key, value = _repeat_heads(query, key, value)
    scores, blind = _scores(query, key, asked)
    weights = torch.softmax(scores, -1).to(value.dtype)
    output = (weights @ value).masked_fill(blind, 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(blind[..., 0], -torch.inf) if asked.return_lse else None
    return output, lse


def forward(query: Tensor, key: Tensor, value: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as `attend`."""
    return attend(query, key, value, asked._replace(return_lse=True))  # type: ignore[return-value]  # lse is asked for


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    asked: Asked,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from the output and its log-sum-exp: the formulas that every rung's backward computes.

    P = exp(S − lse), dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP − delta) with delta = rowsum(dO ∘ O) − dlse, dQ = dS K, dK = dSᵀ Q
    (Dao, 2023, section 2.3.2; the gradient of lse joins delta because ∂lse/∂S = P).
    """
    keys, values = _repeat_heads(query, key, value)
    scores, blind = _scores(query, keys, asked)
    p = torch.exp(scores - lse[..., None]).masked_fill(blind, 0.0)
    dp = (grad_output @ values.transpose(-1, -2)).to(p.dtype)
    delta = (grad_output * output).to(p.dtype).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    ds = p * (dp - delta[..., None])
    if asked.softcap is not None:
        capped = _scores(query, keys, Asked(asked.scale, softcap=asked.softcap))[0]
        ds = ds * (1 - (capped / asked.softcap) ** 2)
    ds = (ds * asked.scale).to(query.dtype)
    dq = ds @ keys
    dk = ds.transpose(-1, -2) @ query
    dv = p.to(query.dtype).transpose(-1, -2) @ grad_output
    group = query.shape[1] // key.shape[1]
    return dq, dk.unflatten(1, (-1, group)).sum(2), dv.unflatten(1, (-1, group)).sum(2)
