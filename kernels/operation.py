"""THE operation: what attention means here, whichever backend runs it.

    attention(query [B, Hq, Sq, D], key [B, Hkv, Sk, D], value [B, Hkv, Sk, D]) -> [B, Hq, Sq, D]

Every backend computes softmax(Q Kᵀ · scale + mask) V with the meaning written down in `attention`'s docstring, or refuses by
name. A backend is a module with

    forward(query, key, value, **meaning)                       -> output, lse
    backward(grad_output, grad_lse, query, key, value, output, lse, **meaning) -> dq, dk, dv
    unsupported(device, dtype, head_dim, features)              -> None, or the reason

and those made of torch operations (eager, sdpa) also have `attend`, which torch differentiates by itself. The flash rungs, in
Triton (flash_v1, flash_v2) and in Gluon (flash_v3), go through the two operators registered below, so that torch.compile,
autocast, activation checkpointing and the FLOP counter know them.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import eager, sdpa
from .generations import ELSEWHERE, describe, dtype_name, generation
from .layout import heads_last

BACKENDS: dict[str, ModuleType | None] = {"eager": eager, "sdpa": sdpa, "flash_v1": None, "flash_v2": None, "flash_v3": None}
if find_spec("triton") is not None:  # a machine that only evaluates may have torch alone
    from . import flash_v1, flash_v2
    from .flash_v3 import launch as flash_v3

    BACKENDS |= {"flash_v1": flash_v1, "flash_v2": flash_v2, "flash_v3": flash_v3}


class Unsupported(ValueError):
    """A backend was asked for by name that cannot run this; the message says why and which can."""


@dataclass(frozen=True)
class Choice:
    """A backend and why it was chosen."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})"


def attention(
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
        scale: factor of the scores; None means 1/sqrt(D).
        window_size: w keeps i - w < j <= i under causality and |i - j| < w without it.
        softcap: c turns the scaled score s into c * tanh(s / c).
        alibi_slopes: [Hq] float32, adds -slope * |i - j| (Press et al., 2022); not differentiated.
        document_ids: [B, S] integers, non-decreasing; positions see their own document only (asks for Sq == Sk).
        return_lse: also return the log-sum-exp of each row's scores, natural log, float32 [B, Hq, Sq], differentiable.
        deterministic: the backward gives the same bits every time. None: if PyTorch's switch says so
            (torch.use_deterministic_algorithms), which is what makes sdpa's so on a GPU.
        backend: "eager", "sdpa", "flash_v1", "flash_v2", "flash_v3", or "auto": the best one for this GPU (`choose` says which).

    Returns:
        The output [B, Hq, Sq, D] in the inputs' dtype, and the log-sum-exp if asked for. Sums are kept in float32. A row that
        sees no key gives output 0, log-sum-exp -inf and zero gradients. Under autocast the inputs are cast to its dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        Unsupported: the backend asked for by name cannot run this; it is never replaced silently.
    """
    if torch.is_autocast_enabled(query.device.type) and query.dtype.is_floating_point and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    check_inputs(query, key, value, window_size, softcap, alibi_slopes, document_ids)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach()
    switched = torch.are_deterministic_algorithms_enabled()
    if deterministic is None:
        deterministic = switched
    asked = (is_causal, window_size, softcap, alibi_slopes, document_ids, return_lse, deterministic)
    used = tuple([feature is not None and feature is not False for feature in asked])
    compiling = torch.compiler.is_compiling()  # a compiler follows the code itself and wants no cache in its way
    pick = _pick.__wrapped__ if compiling else _pick
    name = pick(query.device, query.dtype, query.shape[-1], backend, used, switched)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)

    module = BACKENDS[name]
    if hasattr(module, "attend"):
        output, lse = module.attend(
            query,
            key,
            value,
            scale=scale,
            is_causal=is_causal,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            document_ids=document_ids,
            return_lse=return_lse,
        )
    else:
        if scale <= 0:  # the kernels' scores keep their order under the scale: its sign goes into the query
            query, scale = query * (-1.0 if scale < 0 else 0.0), -scale or 1.0
        differentiate = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        run = _Attention.apply if differentiate and not compiling else attention_forward
        meaning = (scale, is_causal, window_size, softcap, alibi_slopes, document_ids, deterministic)
        output, lse = run(query, key, value, *meaning, name)
    return (output, lse) if return_lse else output


FEATURES = ("is_causal", "window_size", "softcap", "alibi_slopes", "document_ids", "return_lse", "deterministic")


@lru_cache
def _pick(device: torch.device, dtype: torch.dtype, head_dim: int, backend: str, used: tuple[bool, ...], switched: bool) -> str:
    """`choose` by which of FEATURES are used, remembered: a mere call needs no words. It may depend on PyTorch's switch."""
    features = frozenset(name for name, one in zip(FEATURES, used, strict=True) if one)
    return choose(device, dtype, head_dim, backend=backend, features=features).backend


def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    backend: str = "auto",
    features: frozenset[str] = frozenset({"is_causal"}),
) -> Choice:
    """The backend that will run, and the reason.

    Args:
        device, dtype, head_dim: of the query.
        backend: a name, or "auto" for the first in the generation's order that can run this.
        features: the arguments of `attention` that are in use ("is_causal", "window_size", "document_ids", ...).

    Raises:
        Unsupported: the named backend cannot run this.
    """
    where = f"{describe(device)}, {dtype_name(dtype)}, head_dim {head_dim}"
    if backend != "auto":
        reason = why_not(backend, device, dtype, head_dim, features)
        if reason is not None:
            able = [b for b in BACKENDS if b != backend and why_not(b, device, dtype, head_dim, features) is None]
            raise Unsupported(f"attention backend {backend} cannot run here: {reason}; {' and '.join(able)} can")
        return Choice(backend, f"asked for; {where}")
    here = generation(device)
    passed_over = []
    for name in here.order if here else ELSEWHERE:
        reason = why_not(name, device, dtype, head_dim, features)
        if reason is None:
            because = [where] + ([here.brings] if here and name == here.order[0] else []) + passed_over
            return Choice(name, "; ".join(because))
        passed_over.append(f"not {name}: {reason}")
    raise Unsupported(f"no attention backend can run here: {'; '.join(passed_over)}")


def why_not(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, features: frozenset[str]) -> str | None:
    """Why `backend` cannot run this, or None where it can. Raises ValueError for a name that is no backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of auto, {', '.join(BACKENDS)}")
    module = BACKENDS[backend]
    if module is None:
        return "the package triton is not installed"
    return module.unsupported(device, dtype, head_dim, features)


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    document_ids: Tensor | None,
) -> None:
    """Raises ValueError, in one line, for inputs that no backend could give a meaning to."""
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError(f"query, key and value must be [B, H, S, D], not {query.dim()}D, {key.dim()}D and {value.dim()}D")
    (batch, n_head, seq_q, head_dim), (key_batch, n_kv_head, seq_k, key_dim) = query.shape, key.shape
    if key.shape != value.shape:
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} must have the same shape")
    if batch != key_batch or head_dim != key_dim:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} must agree in batch and head_dim")
    if n_kv_head == 0 or n_head % n_kv_head:
        raise ValueError(f"{n_head} query heads cannot share {n_kv_head} key/value heads: the first must be a multiple")
    if not query.dtype == key.dtype == value.dtype or not query.dtype.is_floating_point:
        raise ValueError(f"query, key and value must share a floating dtype, not {query.dtype}, {key.dtype}, {value.dtype}")
    if not query.device == key.device == value.device:
        raise ValueError(f"query, key and value must be on one device, not {query.device}, {key.device}, {value.device}")
    if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1 and head_dim > 1:
        name, stride = next((n, x.stride(-1)) for n, x in (("query", query), ("key", key), ("value", value)) if x.stride(-1) != 1)
        raise ValueError(f"{name}'s last dimension must be contiguous (its stride is {stride}); call .contiguous()")
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size={window_size} must be at least 1: a query sees itself")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be positive")
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


# ---- the operators behind the flash rungs ----
# Registered through torch.library.Library: torch.library.custom_op does the same with 15 µs more on the host for every call.

_MEANING = (
    "float scale, bool is_causal, SymInt? window_size, float? softcap, Tensor? alibi_slopes, Tensor? document_ids, "
    "bool deterministic, str backend"
)
_NAMES = ("scale", "is_causal", "window_size", "softcap", "alibi_slopes", "document_ids", "deterministic")
# The operators' namespace follows the package's name, so that a second copy under another name has its own.
NAMESPACE = __package__.replace(".", "_")
_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(f"attention_forward(Tensor query, Tensor key, Tensor value, {_MEANING}) -> (Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, "
    f"{_MEANING}) -> (Tensor, Tensor, Tensor)"
)
# Output [B, Hq, Sq, D] (in memory [B, Sq, Hq, D]) and log-sum-exp [B, Hq, Sq] of the named backend; gradients of query, key, value.
attention_forward = getattr(torch.ops, NAMESPACE).attention_forward.default
attention_backward = getattr(torch.ops, NAMESPACE).attention_backward.default


@torch.library.impl(_library, "attention_forward", "CompositeExplicitAutograd")
def _forward(query: Tensor, key: Tensor, value: Tensor, *meaning: Any) -> tuple[Tensor, Tensor]:
    return BACKENDS[meaning[-1]].forward(query, key, value, **dict(zip(_NAMES[:-1], meaning, strict=False)))


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _backward(*tensors_and_meaning: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, meaning = tensors_and_meaning[:7], tensors_and_meaning[7:]
    return BACKENDS[meaning[-1]].backward(*tensors, **dict(zip(_NAMES, meaning, strict=False)))


@torch.library.register_fake(f"{NAMESPACE}::attention_forward")
def _(query: Tensor, key: Tensor, value: Tensor, *meaning: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return heads_last(query), query.new_empty(query.shape[:3], dtype=lse_dtype)


@torch.library.register_fake(f"{NAMESPACE}::attention_backward")
def _(grad_output: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return heads_last(query), heads_last(key), heads_last(value)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, is_causal, window_size, softcap, alibi_slopes, document_ids, deterministic, backend = inputs
    ctx.save_for_backward(*tensors, *output, alibi_slopes, document_ids)
    ctx.meaning, ctx.ending = (scale, is_causal, window_size, softcap), (deterministic, backend)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple:
    *tensors, alibi_slopes, document_ids = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(tensors[3])
    grads = attention_backward(grad_output, grad_lse, *tensors, *ctx.meaning, alibi_slopes, document_ids, *ctx.ending)
    return *grads, *[None] * 8


def _differentiate_again(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError("the flash rungs have no second derivative; attention's eager and sdpa backends have one")


torch.library.register_autograd(f"{NAMESPACE}::attention_forward", _differentiate, setup_context=_save)
torch.library.register_autograd(f"{NAMESPACE}::attention_backward", _differentiate_again)


class _Attention(torch.autograd.Function):
    """The same two operators for uncompiled code, where torch.library's own way to differentiate costs 30 µs more a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = attention_forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


@register_flop_formula(getattr(torch.ops, NAMESPACE).attention_forward)
def _forward_flops(query, key, value, *args, **kwargs) -> int:  # noqa: ANN001, ANN002, ANN003
    """Two matrix products of 2·Sq·Sk·D per head, causality not subtracted: torch's own convention for its attention."""
    batch, heads, seq_q, head_dim = query
    return 4 * batch * heads * seq_q * key[2] * head_dim


@register_flop_formula(getattr(torch.ops, NAMESPACE).attention_backward)
def _backward_flops(grad_output, grad_lse, query, key, *args, **kwargs) -> int:  # noqa: ANN001, ANN002, ANN003
    """Five matrix products: the scores again, and one for each of dP, dV, dQ, dK."""
    batch, heads, seq_q, head_dim = query
    return 10 * batch * heads * seq_q * key[2] * head_dim
