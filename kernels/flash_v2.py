"""FlashAttention-2 in Triton: tiles in registers and shared memory, O(N) memory, parallel over the sequence.

Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023), Algorithms 1 and 2:

- a program owns a tile of *queries* and walks the keys, so long sequences fill the GPU even at batch 1 (section 3.2);
- the output is kept unnormalised and divided by the row sum once, at the end (section 3.1);
- only the log-sum-exp of a row is kept for the backward (section 3.1.1), which recomputes the probabilities.

One change from the paper: its backward adds dQ with atomics. Here a second kernel owns the tiles of dQ, so the backward is
deterministic, at the price of two more matrix products (seven instead of five).

Letters: q, k, v tiles of query, key, value; s scores, p probabilities, m running row maximum, l running row sum; do, dq, ds, ...
their gradients; delta = rowsum(do * o). Scores are kept in the base-2 logarithm, because the hardware's exponential is exp2.
"""

import math
import warnings
from contextlib import nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.generations import capability
from kernels.jit import INTERPRET, interpreter_trouble
from kernels.layout import heads_last
from kernels.tile_ops import dot, key_range, load_tile, move, round_to, sees, store_tile, tile_offsets
from kernels.tiles import Tile, tiles

FEATURES = frozenset({"is_causal", "return_lse", "deterministic"})
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, features: frozenset[str]) -> str | None:
    """Why this rung cannot run, or None."""
    if features - FEATURES:
        return f"flash_v2 does not take {' and '.join(sorted(features - FEATURES))}"
    if dtype not in DTYPES:
        return f"flash_v2 takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if not 16 <= head_dim <= 256:
        return f"flash_v2 takes head_dim 16 to 256, not {head_dim}"
    if device.type == "cpu":
        return interpreter_trouble()
    found = capability(device)
    if found is None:
        return f"flash_v2 needs an NVIDIA GPU, not {device.type}"
    if found < (8, 0):
        return f"flash_v2 needs Ampere (compute capability 8.0) or newer, not {found[0]}.{found[1]}"
    return None


# ---- the kernels ----


@triton.jit
def _forward_steps(
    acc, l, m, q, k_base, v_base, k_offsets, v_offsets, rows, start, stop, seq_q, seq_k, stride_kn, stride_vn, qk_scale,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for first in range(start, stop, BLOCK_K):
        cols = first + tl.arange(0, BLOCK_K)
        k = load_tile(move(k_base, first, stride_kn), k_offsets, cols, seq_k, HEAD_DIM, BLOCK_D, MASKED)
        s = dot(q, tl.trans(k), None, PRECISION)
        if MASKED:
            s = tl.where(sees(rows[:, None], cols[None, :], seq_q, seq_k, IS_CAUSAL), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = m_new * qk_scale
        if MASKED:  # a row that has seen nothing yet: its maximum is -inf, and -inf - -inf would be NaN
            shift = tl.where(m_new == float("-inf"), 0.0, shift)
        p = tl.exp2(s * qk_scale - shift[:, None])
        rescale = tl.exp2(m * qk_scale - shift)
        l = l * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        v = load_tile(move(v_base, first, stride_vn), v_offsets, cols, seq_k, HEAD_DIM, BLOCK_D, MASKED)
        acc = dot(round_to(p, v.dtype), v, acc, PRECISION)
        m = m_new
    return acc, l, m


@triton.jit
def _forward_kernel(
    Q, K, V, O, LSE,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    n_head, group, seq_q, seq_k, scale,
    IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of BLOCK_Q queries of one head.

    It loops over tiles of BLOCK_K keys and values, streamed through shared memory; first the tiles that every row sees whole,
    then those that the diagonal or the end of the sequence cuts. Its queries stay in shared memory; the scores of one tile, the
    unnormalised output, m and l live in registers. Tiles of a head are neighbours, the longest first, so that K and V are
    shared through L2 and the last wave is made of short ones.
    """
    n_tile = tl.cdiv(seq_q, BLOCK_Q)
    tile = n_tile - 1 - tl.program_id(0) % n_tile
    batch = (tl.program_id(0) // n_tile // n_head).to(tl.int64)
    head = (tl.program_id(0) // n_tile % n_head).to(tl.int64)
    first_row = tile * BLOCK_Q
    rows = first_row + tl.arange(0, BLOCK_Q)
    qk_scale = scale * LOG2E

    q_base = Q + batch * stride_qb + head * stride_qh + first_row.to(tl.int64) * stride_qn
    k_base = K + batch * stride_kb + head // group * stride_kh
    v_base = V + batch * stride_vb + head // group * stride_vh
    q = load_tile(q_base, tile_offsets(BLOCK_Q, BLOCK_D, stride_qn, WIDE), rows, seq_q, HEAD_DIM, BLOCK_D, True)
    k_offsets = tile_offsets(BLOCK_K, BLOCK_D, stride_kn, WIDE)
    v_offsets = tile_offsets(BLOCK_K, BLOCK_D, stride_vn, WIDE)

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    whole, end = key_range(first_row, seq_q, seq_k, IS_CAUSAL, BLOCK_Q, BLOCK_K)
    acc, l, m = _forward_steps(
        acc, l, m, q, k_base, v_base, k_offsets, v_offsets, rows, 0, whole, seq_q, seq_k, stride_kn, stride_vn, qk_scale,
        False, IS_CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION,
    )  # fmt: skip
    acc, l, m = _forward_steps(
        acc, l, m, q, k_base, v_base, k_offsets, v_offsets, rows, whole, end, seq_q, seq_k, stride_kn, stride_vn, qk_scale,
        True, IS_CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION,
    )  # fmt: skip

    blind = m == float("-inf")  # rows that see no key: output 0, log-sum-exp -inf
    o = acc / tl.where(blind, 1.0, l)[:, None]
    lse = tl.where(blind, float("-inf"), (m * qk_scale + tl.log2(l)) * LN2)
    o_base = O + batch * stride_ob + head * stride_oh + first_row.to(tl.int64) * stride_on
    store_tile(o_base, tile_offsets(BLOCK_Q, BLOCK_D, stride_on, WIDE), o, rows, seq_q, HEAD_DIM, BLOCK_D)
    tl.store(LSE + (batch * n_head + head) * seq_q + rows, lse, mask=rows < seq_q)


@triton.jit
def _dq_steps(
    dq, q, do, lse, delta, k_base, v_base, k_offsets, v_offsets, rows, start, stop, seq_q, seq_k, stride_kn, stride_vn, qk_scale,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for first in range(start, stop, BLOCK_K):
        cols = first + tl.arange(0, BLOCK_K)
        k = load_tile(move(k_base, first, stride_kn), k_offsets, cols, seq_k, HEAD_DIM, BLOCK_D, MASKED)
        v = load_tile(move(v_base, first, stride_vn), v_offsets, cols, seq_k, HEAD_DIM, BLOCK_D, MASKED)
        s = dot(q, tl.trans(k), None, PRECISION)
        p = tl.exp2(s * qk_scale - lse[:, None])
        if MASKED:
            p = tl.where(sees(rows[:, None], cols[None, :], seq_q, seq_k, IS_CAUSAL), p, 0.0)
        dp = dot(do, tl.trans(v), None, PRECISION)
        ds = p * (dp - delta[:, None])
        dq = dot(round_to(ds, k.dtype), k, dq, PRECISION)
    return dq


@triton.jit
def _dq_kernel(
    Q, K, V, O, LSE, DO, DLSE, DQ, DELTA,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_dob, stride_doh, stride_don, stride_dqb, stride_dqh, stride_dqn,
    n_head, group, seq_q, seq_k, scale,
    IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of a tile of BLOCK_Q queries, and their delta, which the dK/dV kernel reads.

    It loops over the same tiles of keys and values as the forward, in the same order. q and do stay in shared memory; s, dp and
    the gradient live in registers. The gradient of the log-sum-exp enters through delta, since d lse / d s = p.
    """
    n_tile = tl.cdiv(seq_q, BLOCK_Q)
    tile = n_tile - 1 - tl.program_id(0) % n_tile
    batch = (tl.program_id(0) // n_tile // n_head).to(tl.int64)
    head = (tl.program_id(0) // n_tile % n_head).to(tl.int64)
    first_row = tile * BLOCK_Q
    rows = first_row + tl.arange(0, BLOCK_Q)
    start = first_row.to(tl.int64)

    q_base = Q + batch * stride_qb + head * stride_qh + start * stride_qn
    o_base = O + batch * stride_ob + head * stride_oh + start * stride_on
    do_base = DO + batch * stride_dob + head * stride_doh + start * stride_don
    per_row = (batch * n_head + head) * seq_q + rows
    do_offsets = tile_offsets(BLOCK_Q, BLOCK_D, stride_don, WIDE)
    o = load_tile(o_base, tile_offsets(BLOCK_Q, BLOCK_D, stride_on, WIDE), rows, seq_q, HEAD_DIM, BLOCK_D, True)
    do = load_tile(do_base, do_offsets, rows, seq_q, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if DLSE is not None:
        delta -= tl.load(DLSE + per_row, mask=rows < seq_q, other=0.0)
    tl.store(DELTA + per_row, delta, mask=rows < seq_q)

    q = load_tile(q_base, tile_offsets(BLOCK_Q, BLOCK_D, stride_qn, WIDE), rows, seq_q, HEAD_DIM, BLOCK_D, True)
    do = do.to(q.dtype)
    lse = tl.load(LSE + per_row, mask=rows < seq_q, other=float("inf")) * LOG2E
    k_base = K + batch * stride_kb + head // group * stride_kh
    v_base = V + batch * stride_vb + head // group * stride_vh
    k_offsets = tile_offsets(BLOCK_K, BLOCK_D, stride_kn, WIDE)
    v_offsets = tile_offsets(BLOCK_K, BLOCK_D, stride_vn, WIDE)

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    whole, end = key_range(first_row, seq_q, seq_k, IS_CAUSAL, BLOCK_Q, BLOCK_K)
    dq = _dq_steps(
        dq, q, do, lse, delta, k_base, v_base, k_offsets, v_offsets, rows, 0, whole, seq_q, seq_k, stride_kn, stride_vn,
        scale * LOG2E, False, IS_CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION,
    )  # fmt: skip
    dq = _dq_steps(
        dq, q, do, lse, delta, k_base, v_base, k_offsets, v_offsets, rows, whole, end, seq_q, seq_k, stride_kn, stride_vn,
        scale * LOG2E, True, IS_CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION,
    )  # fmt: skip
    dq_base = DQ + batch * stride_dqb + head * stride_dqh + start * stride_dqn
    store_tile(dq_base, tile_offsets(BLOCK_Q, BLOCK_D, stride_dqn, WIDE), dq * scale, rows, seq_q, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkdv_steps(
    dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_offsets, do_offsets, cols, start, stop, seq_q, seq_k,
    stride_qn, stride_don, qk_scale,
    MASKED: tl.constexpr, RAGGED: tl.constexpr, IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for first in range(start, stop, BLOCK_Q):
        rows = first + tl.arange(0, BLOCK_Q)
        q = load_tile(move(q_base, first, stride_qn), q_offsets, rows, seq_q, HEAD_DIM, BLOCK_D, RAGGED)
        do = load_tile(move(do_base, first, stride_don), do_offsets, rows, seq_q, HEAD_DIM, BLOCK_D, RAGGED).to(q.dtype)
        if RAGGED:  # rows beyond the end: an infinite log-sum-exp makes their probabilities zero
            lse = tl.load(lse_base + rows, mask=rows < seq_q, other=float("inf")) * LOG2E
            delta = tl.load(delta_base + rows, mask=rows < seq_q, other=0.0)
        else:
            lse = tl.load(lse_base + rows) * LOG2E
            delta = tl.load(delta_base + rows)
        # Transposed, keys by queries, so that p and ds enter the next products straight from registers.
        s = dot(k, tl.trans(q), None, PRECISION)
        p = tl.exp2(s * qk_scale - lse[None, :])
        if MASKED:  # keys beyond the end need no mask: their gradients are not written
            p = tl.where(cols[:, None] <= rows[None, :] + (seq_k - seq_q), p, 0.0)
        dv = dot(round_to(p, do.dtype), do, dv, PRECISION)
        dp = dot(v, tl.trans(do), None, PRECISION)
        ds = p * (dp - delta[None, :])
        dk = dot(round_to(ds, q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def _dkdv_kernel(
    Q, K, V, LSE, DO, DELTA, DK, DV,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_don, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    n_kv_head, group, seq_q, seq_k, scale,
    IS_CAUSAL: tl.constexpr, RAGGED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of a tile of BLOCK_K keys and values of one key/value head.

    It loops over the query heads of the group, and for each over the tiles of queries that see these keys: first those that the
    diagonal cuts, then those that see all of them. k and v stay in shared memory; s and dp (transposed) and both gradients live
    in registers, so the sum over the group needs no atomics.
    """
    n_tile = tl.cdiv(seq_k, BLOCK_K)
    tile = tl.program_id(0) % n_tile  # the first keys are seen by the most queries: longest first
    batch = (tl.program_id(0) // n_tile // n_kv_head).to(tl.int64)
    kv_head = (tl.program_id(0) // n_tile % n_kv_head).to(tl.int64)
    first_col = tile * BLOCK_K
    cols = first_col + tl.arange(0, BLOCK_K)
    start = first_col.to(tl.int64)

    k_base = K + batch * stride_kb + kv_head * stride_kh + start * stride_kn
    v_base = V + batch * stride_vb + kv_head * stride_vh + start * stride_vn
    k = load_tile(k_base, tile_offsets(BLOCK_K, BLOCK_D, stride_kn, WIDE), cols, seq_k, HEAD_DIM, BLOCK_D, True)
    v = load_tile(v_base, tile_offsets(BLOCK_K, BLOCK_D, stride_vn, WIDE), cols, seq_k, HEAD_DIM, BLOCK_D, True)
    q_offsets = tile_offsets(BLOCK_Q, BLOCK_D, stride_qn, WIDE)
    do_offsets = tile_offsets(BLOCK_Q, BLOCK_D, stride_don, WIDE)

    # Queries before `cut` see none of these keys, those from `whole` on see all of them.
    cut = 0
    whole = 0
    if IS_CAUSAL:
        diagonal = first_col - (seq_k - seq_q)
        cut = tl.minimum(tl.maximum(diagonal, 0) // BLOCK_Q * BLOCK_Q, seq_q)
        whole = tl.minimum(tl.cdiv(tl.maximum(diagonal + BLOCK_K - 1, 0), BLOCK_Q) * BLOCK_Q, seq_q)

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        q_base = Q + batch * stride_qb + head * stride_qh
        do_base = DO + batch * stride_dob + head * stride_doh
        lse_base = LSE + (batch * n_kv_head * group + head) * seq_q
        delta_base = DELTA + (batch * n_kv_head * group + head) * seq_q
        if IS_CAUSAL:
            dk, dv = _dkdv_steps(
                dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_offsets, do_offsets, cols, cut, whole, seq_q, seq_k,
                stride_qn, stride_don, scale * LOG2E,
                True, RAGGED, IS_CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_Q, PRECISION,
            )  # fmt: skip
        dk, dv = _dkdv_steps(
            dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_offsets, do_offsets, cols, whole, seq_q, seq_q, seq_k,
            stride_qn, stride_don, scale * LOG2E,
            False, RAGGED, IS_CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_Q, PRECISION,
        )  # fmt: skip

    dk_base = DK + batch * stride_dkb + kv_head * stride_dkh + start * stride_dkn
    dv_base = DV + batch * stride_dvb + kv_head * stride_dvh + start * stride_dvn
    store_tile(dk_base, tile_offsets(BLOCK_K, BLOCK_D, stride_dkn, WIDE), dk * scale, cols, seq_k, HEAD_DIM, BLOCK_D)
    store_tile(dv_base, tile_offsets(BLOCK_K, BLOCK_D, stride_dvn, WIDE), dv, cols, seq_k, HEAD_DIM, BLOCK_D)


# ---- the launches ----


def forward(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, is_causal: bool, output_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Sq, D] (in memory [B, Sq, Hq, D]; in `output_dtype`, by default the inputs') and lse [B, Hq, Sq] float32.

    Any Sq and Sk, GQA and MQA, any strides with a contiguous last dimension; scale must be positive.
    """
    if INTERPRET:
        _warn_once()
    batch, n_head, seq_q, head_dim = query.shape
    n_kv_head, seq_k = key.shape[1], key.shape[2]
    output = heads_last(query, output_dtype)
    lse = torch.empty((batch, n_head, seq_q), device=query.device, dtype=torch.float32)
    if output.numel() == 0 or seq_k == 0:
        return output.zero_(), lse.fill_(-math.inf)
    tile = tiles(query.device, query.dtype, head_dim).forward
    grid = (triton.cdiv(seq_q, tile.block_q) * batch * n_head,)
    with _on(query):
        _forward_kernel[grid](
            query, key, value, output, lse, *_strides(query, key, value, output),
            n_head, n_head // n_kv_head, seq_q, seq_k, scale,
            IS_CAUSAL=is_causal, HEAD_DIM=head_dim, **_options(tile, query, key, value, output),
        )  # fmt: skip
    return output, lse


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in their dtypes, in memory [B, S, H, D]; the same bits every time.

    `output` and `lse` may come from several forwards merged (ring attention): only delta and the probabilities are made of them.
    """
    batch, n_head, seq_q, head_dim = query.shape
    n_kv_head, seq_k = key.shape[1], key.shape[2]
    dq, dk, dv = heads_last(query), heads_last(key), heads_last(value)
    if query.numel() == 0 or seq_k == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    if grad_output.stride(-1) != 1:  # expanded, as .sum() sends it back
        grad_output = grad_output.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    delta = torch.empty_like(lse)
    group = n_head // n_kv_head
    chosen = tiles(query.device, query.dtype, head_dim)
    with _on(query):
        tile = chosen.dq
        _dq_kernel[(triton.cdiv(seq_q, tile.block_q) * batch * n_head,)](
            query, key, value, output, lse, grad_output, grad_lse, dq, delta,
            *_strides(query, key, value, output, grad_output, dq), n_head, group, seq_q, seq_k, scale,
            IS_CAUSAL=is_causal, HEAD_DIM=head_dim, **_options(tile, query, key, value, output, grad_output),
        )  # fmt: skip
        tile = chosen.dkdv
        _dkdv_kernel[(triton.cdiv(seq_k, tile.block_k) * batch * n_kv_head,)](
            query, key, value, lse, grad_output, delta, dk, dv,
            *_strides(query, key, value, grad_output, dk, dv), n_kv_head, group, seq_q, seq_k, scale,
            IS_CAUSAL=is_causal, HEAD_DIM=head_dim, RAGGED=seq_q % tile.block_q != 0,
            **_options(tile, query, key, value, grad_output),
        )  # fmt: skip
    return dq, dk, dv


@cache
def _warn_once() -> None:
    warnings.warn("flash_v2 runs in Triton's interpreter on the CPU: for checking, far too slow to train with", stacklevel=2)


def _strides(*tensors: Tensor) -> list[int]:
    """Batch, head and position strides of each tensor, in elements."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _options(tile: Tile, *tensors: Tensor) -> dict:
    """What every launch passes: block sizes, precision, and whether offsets inside one tile need 64 bits."""
    head_dim, longest = tensors[0].shape[-1], max(tile.block_q, tile.block_k)
    return {
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "PRECISION": precision(tensors[0].dtype, head_dim),
        "WIDE": any(longest * x.stride(2) >= 2**31 for x in tensors),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


def precision(dtype: torch.dtype, head_dim: int) -> str:
    """How tl.dot multiplies float32: as float32 unless PyTorch has been told that TensorFloat-32 will do.

    Up to head_dim 128 three TensorFloat-32 products stand for one of float32, with the same error; beyond, they lose 2.4 times as
    much as eager attention does, and plain multiply-adds it is.
    """
    if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "tf32x3" if head_dim <= 128 else "ieee"


def _on(x: Tensor) -> torch.cuda.device | nullcontext:
    """Triton launches on the current device; this makes it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
