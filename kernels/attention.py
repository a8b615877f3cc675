"""THE operation: what attention means here, whichever backend runs it.

    attention(query [B, Hq, Sq, D], key [B, Hkv, Sk, D], value [B, Hkv, Sk, D]) -> [B, Hq, Sq, D]

Every backend computes softmax(Q Kᵀ · scale + mask) V with the meaning written down in `attention`'s docstring, or refuses by
name. A backend is a module with

    forward(query, key, value, **meaning)                       -> output, lse
    backward(grad_output, grad_lse, query, key, value, output, lse, **meaning) -> dq, dk, dv
    unsupported(device, dtype, head_dim, features)              -> None, or the reason

and those made of torch operations (eager, sdpa) also have `attend`, which torch differentiates by itself. The Triton rungs go
through the two operators registered below, so that torch.compile, autocast, activation checkpointing and the FLOP counter know
them.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import eager, sdpa
from kernels.generations import ELSEWHERE, describe, generation
from kernels.layout import heads_last

BACKENDS: dict[str, ModuleType | None] = {"eager": eager, "sdpa": sdpa, "flash_v2": None}
if find_spec("triton") is not None:  # a machine that only evaluates may have torch alone
    from kernels import flash_v2

    BACKENDS["flash_v2"] = flash_v2


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
    deterministic: bool = False,
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
        deterministic: the backward gives the same bits every time.
        backend: "eager", "sdpa", "flash_v2", or "auto", which takes the best one for this GPU (`choose` says which and why).

    Returns:
        The output [B, Hq, Sq, D] in the inputs' dtype, and the log-sum-exp if asked for. Sums are kept in float32. A row that
        sees no key gives output 0, log-sum-exp -inf and zero gradients. Under autocast the inputs are cast to its dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        Unsupported: the backend asked for by name cannot run this; it is never replaced silently.
    """
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    check_inputs(query, key, value, window_size, softcap, alibi_slopes, document_ids)
    features = {
        "is_causal": is_causal,
        "window_size": window_size is not None,
        "softcap": softcap is not None,
        "alibi_slopes": alibi_slopes is not None,
        "document_ids": document_ids is not None,
        "return_lse": return_lse,
        "deterministic": deterministic,
        "a scale that is not positive": scale is not None and scale <= 0,
    }
    asked = frozenset(name for name, used in features.items() if used)
    shape = (query.device, query.dtype, query.shape[-1])
    name = backend
    if backend == "auto" or why_not(backend, *shape, asked) is not None:  # words cost time; a mere call needs none
        name = choose(*shape, backend=backend, features=asked).backend
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
        output, lse = attention_forward(query, key, value, scale, is_causal, name)
    return (output, lse) if return_lse else output


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
    where = f"{describe(device)}, {str(dtype).removeprefix('torch.')}, head_dim {head_dim}"
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
            because = [where] + ([here.brings] if here and name.startswith("flash") else []) + passed_over
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
    if key.shape != value.shape:
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} must have the same shape")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} must agree in batch and head_dim")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads cannot share {key.shape[1]} key/value heads: the first must be a multiple")
    if not query.dtype == key.dtype == value.dtype or not query.dtype.is_floating_point:
        raise ValueError(f"query, key and value must share a floating dtype, not {query.dtype}, {key.dtype}, {value.dtype}")
    if not query.device == key.device == value.device:
        raise ValueError(f"query, key and value must be on one device, not {query.device}, {key.device}, {value.device}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name}'s last dimension must be contiguous (its stride is {x.stride(-1)}); call .contiguous()")
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size={window_size} must be at least 1: a query sees itself")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be positive")
    if alibi_slopes is not None and alibi_slopes.shape != (query.shape[1],):
        raise ValueError(f"alibi_slopes must be [Hq] = [{query.shape[1]}], not {tuple(alibi_slopes.shape)}")
    if document_ids is not None and (
        document_ids.shape != (query.shape[0], query.shape[2]) or query.shape[2] != key.shape[2] or document_ids.is_floating_point()
    ):
        given = f"{document_ids.dtype} {tuple(document_ids.shape)}"
        raise ValueError(f"document_ids must be integers [B, S] with Sq == Sk, not {given}")


# ---- the operators behind the Triton rungs ----


@torch.library.custom_op("flash_ladder::attention_forward", mutates_args=())
def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Sq, D] (in memory [B, Sq, Hq, D]) and log-sum-exp [B, Hq, Sq] of the named backend."""
    return BACKENDS[backend].forward(query, key, value, scale=scale, is_causal=is_causal)


@torch.library.custom_op("flash_ladder::attention_backward", mutates_args=())
def attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    return BACKENDS[backend].backward(grad_output, grad_lse, query, key, value, output, lse, scale=scale, is_causal=is_causal)


@attention_forward.register_fake
def _(query, key, value, scale, is_causal, backend):  # noqa: ANN001, ANN202
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return heads_last(query), query.new_empty(query.shape[:3], dtype=lse_dtype)


@attention_backward.register_fake
def _(grad_output, grad_lse, query, key, value, output, lse, scale, is_causal, backend):  # noqa: ANN001, ANN202
    return heads_last(query), heads_last(key), heads_last(value)


def _save(ctx, inputs, output) -> None:  # noqa: ANN001
    query, key, value, *ctx.meaning = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple:  # noqa: ANN001
    query, key, value, output, lse = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    grads = attention_backward(grad_output, grad_lse, query, key, value, output, lse, *ctx.meaning)
    return *grads, None, None, None


attention_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.flash_ladder.attention_forward)
def _forward_flops(query, key, value, *args, **kwargs) -> int:  # noqa: ANN001, ANN002, ANN003
    """Two matrix products of 2·Sq·Sk·D per head, causality not subtracted: torch's own convention for its attention."""
    batch, heads, seq_q, head_dim = query
    return 4 * batch * heads * seq_q * key[2] * head_dim


@register_flop_formula(torch.ops.flash_ladder.attention_backward)
def _backward_flops(grad_output, grad_lse, query, key, *args, **kwargs) -> int:  # noqa: ANN001, ANN002, ANN003
    """Five matrix products: the scores again, and one for each of dP, dV, dQ, dK."""
    batch, heads, seq_q, head_dim = query
    return 10 * batch * heads * seq_q * key[2] * head_dim
