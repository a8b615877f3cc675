"""The flash rungs as two torch operators.

This makes them known to torch.compile, autocast, activation checkpointing and the FLOP counter.

`attention_forward` and `attention_backward` run the backend that they are given by name. Their arguments are the tensors, the
fields of `Asked` in their order, and the backend's name. They are registered through torch.library.Library:
torch.library.custom_op does the same but costs the host 15 µs more per call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .asked import Asked, with_tensors, without_tensors
from .choice import BACKENDS
from .layout import heads_last

# How torch's operator schema spells the types of Asked's fields.
_SCHEMA_TYPES = {
    float: "float",
    bool: "bool",
    int | None: "SymInt?",
    float | None: "float?",
    Tensor | None: "Tensor?",
}
_ASKED = ", ".join(f"{_SCHEMA_TYPES[annotation]} {name}" for name, annotation in Asked.__annotations__.items())
# The operators' namespace follows the package's name, so that a second copy under another name has its own.
NAMESPACE = __package__.replace(".", "_")


def _forward(query: Tensor, key: Tensor, value: Tensor, *asked_and_backend: Any) -> tuple[Tensor, Tensor]:
    *asked, backend = asked_and_backend
    return BACKENDS[backend].forward(query, key, value, Asked(*asked))


def _backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    *asked_and_backend: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *asked, backend = asked_and_backend
    return BACKENDS[backend].backward(grad_output, grad_lse, query, key, value, output, lse, Asked(*asked))


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return heads_last(query), query.new_empty(query.shape[:3], dtype=lse_dtype)


def _fake_backward(
    grad_output: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return heads_last(query), heads_last(key), heads_last(value)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *fields, backend = inputs
    ctx.asked, tensors = without_tensors(fields)
    ctx.save_for_backward(query, key, value, *output, *tensors)
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, run: Callable[..., tuple[Tensor, ...]] | None = None
) -> tuple:
    run = run or attention_backward
    query, key, value, output, lse, *tensors = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    asked = with_tensors(ctx.asked, tensors)
    grads = run(grad_output, grad_lse, query, key, value, output, lse, *asked, ctx.backend)
    return *grads, *[None] * len(asked), None


def _differentiate_again(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError("the flash rungs have no second derivative; attention's eager backend has one")


def _forward_flops(query, key, value, *args, **kwargs) -> int:  # noqa: ANN001, ANN002, ANN003
    """Two matrix products of 2·Sq·Sk·D per head, causality not subtracted: torch's own convention for its attention."""
    batch, heads, seq_q, head_dim = query
    return 4 * batch * heads * seq_q * key[2] * head_dim


def _backward_flops(grad_output, grad_lse, query, key, *args, **kwargs) -> int:  # noqa: ANN001, ANN002, ANN003
    """Five matrix products: the scores again, and one for each of dP, dV, dQ, dK."""
    batch, heads, seq_q, head_dim = query
    return 10 * batch * heads * seq_q * key[2] * head_dim


def _register() -> torch.library.Library:
    """Defines the two operators."""
    library = torch.library.Library(NAMESPACE, "DEF")
    library.define(f"attention_forward(Tensor query, Tensor key, Tensor value, {_ASKED}, str backend) -> (Tensor, Tensor)")
    library.define(
        "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor output, "
        f"Tensor lse, {_ASKED}, str backend) -> (Tensor, Tensor, Tensor)"
    )
    forward, backward = f"{NAMESPACE}::attention_forward", f"{NAMESPACE}::attention_backward"
    torch.library.impl(library, "attention_forward", "CompositeExplicitAutograd")(_forward)
    torch.library.impl(library, "attention_backward", "CompositeExplicitAutograd")(_backward)
    torch.library.register_fake(forward, _fake_forward, lib=library)
    torch.library.register_fake(backward, _fake_backward, lib=library)
    torch.library.register_autograd(forward, _differentiate, setup_context=_save, lib=library)
    torch.library.register_autograd(backward, _differentiate_again, lib=library)
    register_flop_formula(getattr(torch.ops, NAMESPACE).attention_forward)(_forward_flops)
    register_flop_formula(getattr(torch.ops, NAMESPACE).attention_backward)(_backward_flops)
    return library


if "_library" not in globals():  # a reload keeps the operators, which other modules hold on to
    _library = _register()
# Output [B, Hq, Sq, D] (in memory [B, Sq, Hq, D]) and log-sum-exp [B, Hq, Sq] of the named backend; gradients of query, key, value.
attention_forward = getattr(torch.ops, NAMESPACE).attention_forward.default
attention_backward = getattr(torch.ops, NAMESPACE).attention_backward.default


class Attention(torch.autograd.Function):
    """The same two operators for uncompiled code, where torch.library's own autograd costs 30 µs more per call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = attention_forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


class TransformedAttention(torch.autograd.Function):
    """The same for torch.func.grad and its kin, in the form that they ask for; it costs the host 15 µs more per call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return attention_forward(*inputs)

    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        return _differentiate(ctx, grads[0], grads[1], run=_TransformedBackward.apply)


class _TransformedBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return attention_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        """Nothing is saved: there is no second derivative."""

    backward = staticmethod(_differentiate_again)


def differentiable(compiling: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """What runs `attention_forward` so that it can be differentiated."""
    if compiling:
        return attention_forward
    # The question that torch.autograd.Function.apply asks itself; there is no public one.
    return TransformedAttention.apply if torch._C._are_functorch_transforms_active() else Attention.apply
