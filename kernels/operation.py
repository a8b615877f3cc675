"""THE operation: what attention means here, whichever backend runs it.

    attention(query [B, Hq, Sq, D], key [B, Hkv, Sk, D], value [B, Hkv, Sk, D]) -> [B, Hq, Sq, D]

Every backend computes softmax(Q Kᵀ · scale + mask) V with the meaning written down in `attention`'s docstring, or refuses by
name. A backend is a module with

    forward(query, key, value, asked)                                        -> output, lse
    backward(grad_output, grad_lse, query, key, value, output, lse, asked)   -> dq, dk, dv
    unsupported(device, dtype, head_dim, features)                           -> None, or the reason

Those made of torch operations (eager, sdpa) have `attend(query, key, value, asked)`, which torch differentiates by itself; sdpa has
neither forward nor backward. The flash rungs, in Triton (flash_v1, flash_v2) and Gluon (flash_v3), go through `kernels.operators`.
"""

import math
from functools import lru_cache
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .asked import FEATURES, Asked
from .choice import BACKENDS, choose
from .operators import attention_forward, differentiable


# For type checkers: return_lse decides what comes back. The other arguments are those of the function itself.
@overload
def attention(query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[True], **others: Any) -> tuple[Tensor, Tensor]: ...
@overload
def attention(query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[False] = False, **others: Any) -> Tensor: ...
def attention(  # type: ignore[misc]  # the overloads stand for these keywords without repeating them
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention.

    Args:
        query: [B, Hq, Sq, D]; any strides with a contiguous last dimension, so a transposed [B, S, H, D] view costs no copy.
        key, value: [B, Hkv, Sk, D] with Hq a multiple of Hkv: query head h reads key/value head h // (Hq / Hkv).
        is_causal: query i sees keys j <= i, with i aligned bottom-right: i counts from Sk - Sq.
        scale: factor of the scores; None means 1/sqrt(D). Beyond ±1024 only eager takes it. torch.compile makes a graph for each
            value, of softcap too.
        window_size: w keeps i - w < j <= i under causality and |i - j| < w without it.
        softcap: c turns the scaled score s into c * tanh(s / c).
        alibi_slopes: [Hq] float32, adds -slope * |i - j| (Press et al., 2022); not differentiated.
        document_ids: [B, S] integers, non-decreasing; positions see their own document only (needs Sq == Sk).
        return_lse: also return the log-sum-exp of each row's scores, natural log, float32 [B, Hq, Sq], differentiable.
        deterministic: the backward gives the same bits every time. None follows PyTorch's switch
            (torch.use_deterministic_algorithms), which is what makes sdpa deterministic on a GPU.
        backend: "eager", "sdpa", "flash_v1", "flash_v2", "flash_v3", or "auto": the best one for this GPU (`choose` says which).

    Returns:
        The output [B, Hq, Sq, D] in the inputs' dtype, and the log-sum-exp if asked for. Sums are kept in float32. A row that
        sees no key gives output 0, log-sum-exp -inf and zero gradients. Under autocast the inputs are cast to its dtype.
        A mask multiplies a hidden value by 0, so a NaN there reaches rows that do not see it. Scores beyond 1e5, scaled, lose
        digits in the fused backends, and from about 1e9 on may give NaN: their float32 has 24 bits.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        Unsupported: the backend asked for by name cannot run this; it is never replaced silently.
    """
    device = query.device.type  # "meta" has no autocast to ask about
    if device != "meta" and torch.is_autocast_enabled(device) and query.dtype.is_floating_point and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    check_tensors(query, key, value)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    asked = Asked(
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        is_causal=is_causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        document_ids=document_ids,
        return_lse=return_lse,
        deterministic=deterministic,
    )
    check_asked(asked, query, key)
    if window_size is not None:  # sys.maxsize is somebody's word for no window; arithmetic on positions must not overflow
        asked = asked._replace(window_size=min(window_size, 2**62))
    if alibi_slopes is not None:
        asked = asked._replace(alibi_slopes=alibi_slopes.detach())
    compiling = torch.compiler.is_compiling()  # torch.compile traces the choice itself; a cache would be in its way
    symbolic = type(query.shape[-1]) is not int  # under make_fx and ShapeEnv; such a number is no key of a cache
    pick = _pick.__wrapped__ if compiling or symbolic else _pick
    switched = torch.are_deterministic_algorithms_enabled()
    name = pick(query.device, query.dtype, query.shape[-1], backend, asked.used(), switched)

    module = BACKENDS[name]
    if compiling and name != "eager":
        asked = asked._replace(scale=constant(asked.scale), softcap=None if softcap is None else constant(softcap))
    if asked.scale <= 0 and name != "eager":  # fused kernels mask before they scale, so the query takes the sign
        query = query * (-1.0 if asked.scale < 0 else 0.0)
        asked = asked._replace(scale=-asked.scale or 1.0)
    if hasattr(module, "attend"):
        output, lse = module.attend(query, key, value, asked)
    else:
        differentiate = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if not differentiate:
            refuse_tangents(query, key, value)
        run = differentiable(compiling) if differentiate else attention_forward
        output, lse = run(query, key, value, *asked, name)
    return (output, lse) if return_lse else output


@lru_cache
def _pick(device: torch.device, dtype: torch.dtype, head_dim: int, backend: str, used: tuple[bool, ...], switched: bool) -> str:
    """The backend that `choose` names, cached without its reason. `used`: which of FEATURES. `switched`: PyTorch's switch."""
    features = frozenset(name for name, one in zip(FEATURES, used, strict=True) if one)
    return choose(device, dtype, head_dim, backend=backend, features=features).backend


def constant(number: float) -> float:
    """`number`, which torch.compile is made to take as a constant of its graph: a number can be symbolic, a text cannot.

    A number that changed from call to call becomes a symbol, and Inductor's cache of graphs then forgets its value: the third call
    would run the graph of the second. A constant costs a graph for each value.
    """
    return float(f"{number}")


def refuse_tangents(*tensors: Tensor) -> None:
    """Raises NotImplementedError where a tensor carries a forward-mode tangent, which an operator of ours would drop silently."""
    for x in tensors:
        if unpack_dual(x).tangent is not None:
            raise NotImplementedError("the flash rungs have no forward-mode derivative; attention's eager backend has one")


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises ValueError, in one line, for tensors that do not fit together."""
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError(f"query, key and value must be [B, H, S, D], not {query.dim()}D, {key.dim()}D and {value.dim()}D")
    (batch, n_head, _, head_dim), (key_batch, n_kv_head, _, key_dim) = query.shape, key.shape
    if key.shape != value.shape:
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} must have the same shape")
    if batch != key_batch or head_dim != key_dim:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} must agree in batch and head_dim")
    if head_dim == 0:
        raise ValueError(f"query {tuple(query.shape)} has head_dim 0: there is nothing to take products of")
    if n_kv_head == 0 or n_head % n_kv_head:
        raise ValueError(f"{n_head} query heads cannot share {n_kv_head} key/value heads: the first must be a multiple")
    if not query.dtype == key.dtype == value.dtype or not query.dtype.is_floating_point:
        raise ValueError(f"query, key and value must share a floating dtype, not {query.dtype}, {key.dtype}, {value.dtype}")
    if not query.device == key.device == value.device:
        raise ValueError(f"query, key and value must be on one device, not {query.device}, {key.device}, {value.device}")
    if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1 and head_dim > 1:
        name, stride = next((n, x.stride(-1)) for n, x in (("query", query), ("key", key), ("value", value)) if x.stride(-1) != 1)
        raise ValueError(f"{name}'s last dimension must be contiguous (its stride is {stride}); call .contiguous()")


def check_asked(asked: Asked, query: Tensor, key: Tensor) -> None:
    """Raises ValueError, in one line, for arguments that no backend could give a meaning to."""
    (batch, n_head, seq_q, _), seq_k = query.shape, key.shape[2]
    if not -math.inf < asked.scale < math.inf:
        raise ValueError(f"scale={asked.scale} must be a finite number")
    if asked.window_size is not None and not isinstance(asked.window_size, (int, torch.SymInt)):
        raise ValueError(f"window_size={asked.window_size} must be a whole number; None is no window")
    if asked.window_size is not None and asked.window_size < 1:
        raise ValueError(f"window_size={asked.window_size} must be at least 1: a query sees itself")
    if asked.softcap is not None and not 0 < asked.softcap < math.inf:
        raise ValueError(f"softcap={asked.softcap} must be positive and finite; None is no cap")
    alibi_slopes, document_ids = asked.alibi_slopes, asked.document_ids
    if alibi_slopes is not None and (alibi_slopes.shape != (n_head,) or not alibi_slopes.is_floating_point()):
        raise ValueError(f"alibi_slopes must be floating [Hq] = [{n_head}], not {alibi_slopes.dtype} {tuple(alibi_slopes.shape)}")
    for name, x in (("alibi_slopes", alibi_slopes), ("document_ids", document_ids)):
        if x is not None and x.device != query.device:
            raise ValueError(f"{name} must be on the query's device, {query.device}, not {x.device}")
    if document_ids is not None and (
        document_ids.shape != (batch, seq_q) or seq_q != seq_k or document_ids.dtype not in (torch.int32, torch.int64)
    ):
        given = f"{document_ids.dtype} {tuple(document_ids.shape)}"
        raise ValueError(f"document_ids must be int32 or int64 [B, S] with Sq == Sk, not {given}")
