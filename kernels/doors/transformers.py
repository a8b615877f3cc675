"""Attention for any model of Hugging Face's transformers: `register()`, then attn_implementation="ladder".

transformers tells an attention function which keys a query sees by a mask, made once a forward pass. `plan_mask` makes it as a plan
for `attention`: which keys of each sequence count, a window, documents. It asks transformers' own mask, piece by piece, and refuses
one that attention has no words for. `run_layer` is the attention function: it runs one layer by the plan.

(Without a mask function of its own, transformers gives an attention function no mask at all, and padding would be attended to.)

Under torch.compile nothing can be asked of a mask. There a layer goes by its window, and by positions that begin anew with every
document. Padding and caches then need the model uncompiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..operation import attention

CHUNK_ELEMENTS = 2**24  # of transformers' mask that exist at once
# Arguments of transformers' attention functions that would change the result, and that attention has no words for.
UNKNOWN = ("position_bias", "head_mask", "alibi", "attention_bias", "output_attentions")


def register(name: str = "ladder", *, backend: str = "auto") -> None:
    """Makes attn_implementation=`name` work in every transformers model that leaves the choice open.

    backend: as for `attention`. The name must not contain "flash", "paged", "sdpa" or "flex_attention": transformers looks for them
    inside a name, and takes it for its own of that kind.
    Raises ImportError where transformers is missing or older than its masks by offset, ValueError for such a name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError("this door needs transformers 5.24 or later: earlier masks have other arguments")
    if name == "eager" or any(theirs in name for theirs in ("flash", "paged", "sdpa", "flex_attention")):
        raise ValueError(f"name={name!r} means something else in transformers; 'ladder' does not")
    AttentionInterface.register(name, partial(run_layer, backend=backend))
    AttentionMaskInterface.register(name, plan_mask)


@dataclass(frozen=True)
class Plan:
    """Which keys the queries see, in the words of `attention`."""

    seq_q: int
    seq_k: int
    is_causal: bool
    window_size: int | None
    document_ids: Tensor | None  # int32 [B, S], where all keys are those of the queries
    spans: list[tuple[int, int]] | None  # of each sequence: its first key, and the one after its last; None: all keys


# ---- once a forward pass ----


def plan_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """transformers' mask as a plan: None for plain causality over all keys, else an empty tensor with an attribute `plan`.

    Raises ValueError for a mask in which a query sees other keys than one interval, or that is neither causal nor full; under
    torch.compile for padding, caches and masks by chunks.
    """
    if torch.compiler.is_compiling():
        by_chunks = getattr(others.get("config"), "attention_chunk_size", None)
        if attention_mask is not None or q_length != kv_length or others.get("use_vmap") or by_chunks:
            raise ValueError("under torch.compile this door takes no attention_mask, cache or chunked attention; leave them out")
        # transformers may leave plain causality unmasked where it has looked for no documents.
        return None if others.get("allow_is_causal_skip", True) else torch.empty(0, device=device)
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask_function = causal_mask_function if mask_function is None else mask_function
    plain = mask_function is causal_mask_function and (attention_mask is None or bool(attention_mask.all()))
    if plain and q_length == kv_length and isinstance(q_offset, int):
        return None
    start = int(q_offset)
    # Queries that are padding themselves: whatever they see, nobody reads their result.
    counts = torch.ones(batch_size, q_length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        counts = attention_mask[:, start : start + q_length].to(counts)
    rows = max(1, CHUNK_ELEMENTS // (batch_size * kv_length))
    parts = []
    for first in range(0, q_length, rows):
        n = min(rows, q_length - first)
        seen: Any = sdpa_mask(
            batch_size, n, kv_length, start + first, kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=False, use_vmap=others.get("use_vmap", False), device=device,
        )  # fmt: skip
        seen = seen[:, 0].expand(batch_size, -1, -1).to(torch.int32)
        parts.append(torch.stack((seen.argmax(-1), kv_length - 1 - seen.flip(-1).argmax(-1), seen.sum(-1))))
    low, high, number = torch.cat(parts, -1).unbind()
    if not ((number == high - low + 1) | ~counts).all():
        raise ValueError("a query of this mask sees keys that are no interval, and attention has no other masks; use 'eager'")
    mask = torch.empty(0, device=device)
    plan = documents_of(low, high, counts) if q_length == kv_length else spans_of(low, high, counts, start - kv_offset, kv_length)
    mask.plan = plan  # type: ignore[attr-defined]
    return mask


def documents_of(low: Tensor, high: Tensor, counts: Tensor) -> Plan:
    """The plan of a mask over as many keys as queries, in which query i sees those from `low` to `high`, int64 [B, S].

    counts: bool [B, S], which queries are no padding. Padding becomes documents of its own.
    """
    seq_k = low.shape[1]
    own = torch.arange(seq_k, device=low.device).expand_as(low)
    begins = (low == own) | ~counts  # a document begins where a query sees nothing before itself
    first = torch.where(begins, own, 0).cummax(1).values
    last = torch.where(begins.roll(-1, 1), own, seq_k - 1)
    last[:, -1] = seq_k - 1
    last = last.flip(1).cummin(1).values.flip(1)
    is_causal, window_size = _causality(low, high, counts, own, first)
    expected_low = first if window_size is None else torch.maximum(first, own - window_size + 1)
    _check(low, high, counts, expected_low, own if is_causal else last)
    ids = begins.cumsum(1, dtype=torch.int32)
    return Plan(seq_k, seq_k, is_causal, window_size, ids if bool((ids[:, -1] > 1).any()) else None, None)


def spans_of(low: Tensor, high: Tensor, counts: Tensor, place: int, seq_k: int) -> Plan:
    """The plan of a mask over `seq_k` keys and fewer queries, as behind a cache; other arguments as for `documents_of`.

    place: where the first query stands among the keys.
    """
    seq_q = low.shape[1]
    own = (place + torch.arange(seq_q, device=low.device)).expand_as(low)
    first = torch.where(counts, low, seq_k - 1).amin(1, keepdim=True)
    is_causal, window_size = _causality(low, high, counts, own, first)
    last = own[:, -1:] if is_causal else torch.where(counts, high, 0).amax(1, keepdim=True)
    first = torch.minimum(first, last)
    expected_low = first if window_size is None else torch.maximum(first, own - window_size + 1)
    _check(low, high, counts, expected_low, own if is_causal else last)
    spans = torch.cat((first, last + 1), 1).tolist()
    return Plan(seq_q, seq_k, is_causal, window_size, None, [(a, b) for a, b in spans])


def _causality(low: Tensor, high: Tensor, counts: Tensor, own: Tensor, first: Tensor) -> tuple[bool, int | None]:
    """Whether queries see nothing behind themselves, and then the window that cuts what they see before; None for none."""
    if not ((high == own) | ~counts).all():
        return False, None
    is_cut = (low > first) & counts
    return True, int(torch.where(is_cut, own - low + 1, 0).max()) if is_cut.any() else None


def _check(low: Tensor, high: Tensor, counts: Tensor, expected_low: Tensor, expected_high: Tensor) -> None:
    if not (((low == expected_low) & (high == expected_high)) | ~counts).all():
        raise ValueError("this mask is no causality, window, documents or padding, and attention has no others; use 'eager'")


# ---- once a layer ----


def run_layer(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    *,
    backend: str = "auto",
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, Hq, Sq, D], key and value [B, Hkv, Sk, D] -> output [B, Sq, Hq, D], no weights.

    s_aux: sinks [Hq]. Raises ValueError for what attention cannot do: dropout, weights, biases, masks made elsewhere.
    """
    if dropout:
        raise ValueError(f"dropout={dropout}: attention has none; set the model's attention_dropout to 0, or use 'eager'")
    for name in UNKNOWN:
        if others.get(name) is not None and others[name] is not False:
            raise ValueError(f"{name}: attention has nothing like it; use 'eager'")
    call: Callable[..., Any] = partial(attention, scale=scaling, softcap=softcap, backend=backend)
    sinks = None if s_aux is None else s_aux.flatten()
    if torch.compiler.is_compiling():
        ids = None if attention_mask is None else documents_by_position(others.get("position_ids"), query)
        output = call(query, key, value, sinks=sinks, is_causal=True, window_size=sliding_window, document_ids=ids)
        return output.transpose(1, 2), None
    if attention_mask is None:
        if sliding_window is not None and key.shape[2] > sliding_window:
            raise ValueError(f"a window of {sliding_window} without a mask: this model makes its masks by itself; use 'eager'")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return call(query, key, value, sinks=sinks, is_causal=causal).transpose(1, 2), None
    plan: Plan | None = getattr(attention_mask, "plan", None)
    if plan is None:
        raise ValueError("this attention mask was made elsewhere, and attention takes no arbitrary masks; use 'eager'")
    if (plan.seq_q, plan.seq_k) != (query.shape[2], key.shape[2]):
        raise ValueError(f"a mask for {plan.seq_q} queries and {plan.seq_k} keys does not fit {query.shape[2]} and {key.shape[2]}")
    call = partial(call, sinks=sinks, is_causal=plan.is_causal, window_size=plan.window_size)
    if plan.spans is None:
        return call(query, key, value, document_ids=plan.document_ids).transpose(1, 2), None
    if len(set(plan.spans)) == 1:
        start, end = plan.spans[0]
        return call(query, key[:, :, start:end], value[:, :, start:end]).transpose(1, 2), None
    rows = [
        call(q[None], k[None, :, start:end], v[None, :, start:end])
        for q, k, v, (start, end) in zip(query, key, value, plan.spans, strict=True)
    ]
    return torch.cat(rows).transpose(1, 2), None


def documents_by_position(position_ids: Tensor | None, query: Tensor) -> Tensor:
    """Documents of a packed row, int32 [B, S], from positions int64 [1 or B, S] that begin anew with each of them.

    Raises ValueError for a model that keeps its positions to itself.
    """
    if position_ids is None:
        raise ValueError("under torch.compile this door needs a model that gives its layers position_ids; this one does not")
    anew = position_ids[:, 1:] != position_ids[:, :-1] + 1
    ids = torch.nn.functional.pad(anew.cumsum(1), (1, 0)).to(torch.int32)
    return ids.expand(query.shape[0], -1)
