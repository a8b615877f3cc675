"""Attention under the names of the flash_attn package: `from flash_ladder.kernels.doors.flash_attn import flash_attn_func`.

Arguments, their order and what comes back are flash_attn's (2.6 and later), and `backend` names a rung. What they mean:

- Shapes are [B, S, H, D], and [total, H, D] where sequences of different lengths are packed. Any dtype that the backend takes.
- causal and windows align bottom-right: the last query stands at the last key.
- window_size=(left, right) keeps `left` keys before a query and `right` after it; -1 is no limit, and causal makes right 0.
  Attention has windows without a limit, causal ones and symmetric ones, and the others are refused.
- softcap=0 is none. alibi_slopes are [Hq]. s_aux [Hq] are sinks, under the name by which transformers gives them.
- deterministic=False follows PyTorch's switch.
- A row that sees no key gives output 0 and log-sum-exp -inf. (flash_attn 2 gives +inf there.)
- The log-sum-exp is differentiable. In flash_attn it is not.

Raises ValueError for what attention cannot do, and TypeError, as any function does, for an argument that is not in the list.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..operation import attention


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """q [B, Sq, Hq, D], k and v [B, Sk, Hkv, D] -> output [B, Sq, Hq, D].

    return_attn_probs: also the log-sum-exp, float32 [B, Hq, Sq], and an empty tensor (without dropout flash_attn keeps no
    probabilities).
    """
    _refuse(dropout_p=dropout_p)
    _check("[B, S, H, D]", q, k, v)
    words = _words(softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux, backend, q.shape[1], k.shape[1])
    output, lse = _attend(q, k, v, return_attn_probs, deterministic=deterministic or None, **words)
    return output if lse is None else (output, lse, q.new_empty(0))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    s_aux: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """q [total_q, Hq, D], k and v [total_k, Hkv, D] -> output [total_q, Hq, D], of sequences that lie one after another.

    cu_seqlens_q, cu_seqlens_k: int32 [n + 1], where the sequences begin, and the total. max_seqlen_*: length of the longest; a
    window that reaches as far has no limit.
    return_attn_probs: also the log-sum-exp, float32 [Hq, total_q], and an empty tensor.

    Where queries and keys have the same lengths this is one call with documents. If cu_seqlens_q and cu_seqlens_k are one tensor,
    nothing waits for the GPU, and torch.compile makes one graph. Two tensors are compared, for which the host waits. Sequences that
    have other numbers of keys than of queries are attended to one by one.
    """
    _refuse(dropout_p=dropout_p, block_table=block_table)
    _check("[total, H, D]", q, k, v)
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if starts.dim() != 1 or len(starts) < 2 or starts.dtype not in (torch.int32, torch.int64) or starts.device != q.device:
            given = f"{starts.dtype} {tuple(starts.shape)} on {starts.device}"
            raise ValueError(f"{name} must be int32 [n + 1] on the queries' device, {q.device}, not {given}")
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(f"cu_seqlens_q has {len(cu_seqlens_q) - 1} sequences and cu_seqlens_k {len(cu_seqlens_k) - 1}")
    words = _words(softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux, backend, max_seqlen_q, max_seqlen_k)
    words["deterministic"] = deterministic or None
    same = cu_seqlens_q is cu_seqlens_k or torch.equal(cu_seqlens_q, cu_seqlens_k)
    if same and len(q) == len(k):
        place = torch.arange(len(q), device=q.device, dtype=cu_seqlens_q.dtype)
        ids = torch.searchsorted(cu_seqlens_q[1:], place, right=True, out_int32=True)
        output, lse = _attend(q[None], k[None], v[None], return_attn_probs, document_ids=ids[None], **words)
        output, lse = output[0], None if lse is None else lse[0]
    else:
        lengths_q, lengths_k = (_lengths(*pair) for pair in (("q", cu_seqlens_q, q), ("k", cu_seqlens_k, k)))
        sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
        parts = [_attend(a[None], b[None], c[None], return_attn_probs, **words) for a, b, c in sequences]
        output = torch.cat([part[0] for part, _ in parts])
        lse = torch.cat([part[0] for _, part in parts if part is not None], 1) if return_attn_probs else None
    return output if lse is None else (output, lse, q.new_empty(0))


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """q [B, Sq, Hq, D] against the filled part of a cache, k_cache and v_cache [B, S_max, Hkv, D] -> output [B, Sq, Hq, D].

    k, v: [B, S_new, Hkv, D], which are written into the cache, in place, behind the cache_seqlens keys that are there; the
    queries then see them too. They need cache_seqlens.
    cache_seqlens: how many keys are filled, one number or int32 [B]; None means all. The host waits for a tensor, and rows of
    different lengths run one by one.
    num_splits is a hint, which changes no result and is not followed; rotary_interleaved says nothing without rotary_cos.
    return_softmax_lse: also the log-sum-exp, float32 [B, Hq, Sq].
    """
    _refuse(
        rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
        block_table=block_table,
    )  # fmt: skip
    _check("[B, S, H, D]", q, k_cache, v_cache)
    batch, size = k_cache.shape[:2]
    if len(q) != batch or v_cache.shape != k_cache.shape:
        shapes = f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)}"
        raise ValueError(f"{shapes} must have one shape, and the batch of q {tuple(q.shape)}")
    words = _words(softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux, backend, q.shape[1], size)
    if (k is None) != (v is None):
        raise ValueError("k and v are written into the cache together; give both or neither")
    if k is not None and cache_seqlens is None:
        raise ValueError("k and v need cache_seqlens, which says where in the cache they go")
    if isinstance(cache_seqlens, Tensor):
        if cache_seqlens.shape != (batch,) or cache_seqlens.is_floating_point():
            raise ValueError(f"cache_seqlens must be int32 [B] = [{batch}], not {cache_seqlens.dtype} {tuple(cache_seqlens.shape)}")
        filled = cache_seqlens.tolist()
    else:
        filled = [size if cache_seqlens is None else cache_seqlens] * batch
    new = 0
    if k is not None and v is not None:
        new = k.shape[1]
        if k.shape != v.shape or k.shape[::2] != k_cache.shape[::2] or k.shape[3] != k_cache.shape[3]:
            raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must be [B, S_new, Hkv, D] of {tuple(k_cache.shape)}")
    if filled and not 0 <= min(filled) <= max(filled) <= size - new:
        behind = f" and {new} new keys" if new else ""
        raise ValueError(f"cache_seqlens of {min(filled)} to {max(filled)}{behind} do not fit a cache of {size}")
    if k is not None and v is not None:
        for row, n in enumerate(filled):
            k_cache[row, n : n + new] = k[row]
            v_cache[row, n : n + new] = v[row]
    if len(set(filled)) <= 1:
        end = filled[0] + new if filled else size
        output, lse = _attend(q, k_cache[:, :end], v_cache[:, :end], return_softmax_lse, **words)
    else:
        rows = [
            _attend(q[i : i + 1], k_cache[i : i + 1, : n + new], v_cache[i : i + 1, : n + new], return_softmax_lse, **words)
            for i, n in enumerate(filled)
        ]
        output = torch.cat([row for row, _ in rows])
        lse = torch.cat([row for _, row in rows if row is not None]) if return_softmax_lse else None
    return output if lse is None else (output, lse)


def _attend(q: Tensor, k: Tensor, v: Tensor, with_lse: bool, **words: Any) -> tuple[Tensor, Tensor | None]:
    """Output [B, Sq, Hq, D] and log-sum-exp [B, Hq, Sq] of q [B, Sq, Hq, D], k and v [B, Sk, Hkv, D]; `words` are attention's."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not with_lse:
        return attention(q, k, v, **words).transpose(1, 2), None
    output, lse = attention(q, k, v, return_lse=True, **words)
    return output.transpose(1, 2), lse


def _words(
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    s_aux: Tensor | None,
    backend: str,
    seq_q: int,
    seq_k: int,
) -> dict[str, Any]:
    """flash_attn's arguments as those of `attention`, for up to seq_q queries and seq_k keys. Raises ValueError for a window."""
    left, right = window_size
    right = 0 if causal else right
    if left != right:  # a reach as long as the sequence is no limit: some callers mean "all" by it
        left = -1 if left >= seq_k - 1 else left
        right = -1 if right > 0 and right >= seq_q - 1 else right
    if right != 0 and left != right and not (left < 0 and right < 0):
        raise ValueError(
            f"window_size={tuple(window_size)}: attention has causal windows (left, 0), symmetric ones (n, n) and (-1, -1); "
            "another one needs the flash_attn package"
        )
    return {
        "scale": softmax_scale,
        "is_causal": right == 0,
        "window_size": None if left < 0 else left + 1,
        "softcap": softcap or None,
        "alibi_slopes": alibi_slopes,
        "sinks": s_aux,
        "backend": backend,
    }


def _refuse(**given: Any) -> None:
    """Raises ValueError for an argument that asks for what attention has not."""
    for name, value in given.items():
        if value is not None and (isinstance(value, Tensor) or value != 0):
            says = f"{name}={value}" if isinstance(value, float) else name
            raise ValueError(f"{says}: attention has nothing like it; leave it out, or use the flash_attn package")


def _check(shape: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError for tensors that are not of as many dimensions as `shape`."""
    n = shape.count(",") + 1
    if not q.dim() == k.dim() == v.dim() == n:
        raise ValueError(f"q, k and v must be {shape}, not {q.dim()}D, {k.dim()}D and {v.dim()}D")


def _lengths(name: str, starts: Tensor, x: Tensor) -> list[int]:
    """Lengths of the sequences in x that begin at `starts`. Raises ValueError where they are not those of all of x."""
    ends = starts.tolist()
    lengths = [b - a for a, b in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != len(x) or min(lengths) < 0:
        raise ValueError(f"cu_seqlens_{name} must rise from 0 to {len(x)}, the total of {name}, and it is {ends}")
    return lengths
