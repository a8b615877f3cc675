"""FlashAttention-1 in Triton: attention in tiles that never leave the chip, O(N) memory, parallel over batch and heads only.

Dao, Fu, Ermon, Rudra, Ré, "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness" (2022), Algorithms 1 and
4, line by line: keys and values are the outer loop, queries the inner one. Since each query meets its keys over several outer
steps, its output, row maximum m and row sum l wait in GPU memory in between, and every step rescales the output.

What flash_v2 changes, and why (Dao, 2023):

- *Loops swapped* (Algorithm 1, lines 5 and 7). With queries outside, output, m and l stay in registers until they are done. They
  cause no traffic, and no query's tiles have to wait for another's.
- *Parallel over the sequence* (section 3.2). Here a program owns a whole head: 16 heads keep 16 of an H200's 132 multiprocessors
  busy. In flash_v2 a program owns one tile of queries.
- *One division a row* (section 3.1.1). Line 12 here divides by the new row sum and multiplies by the old one at every step.
  flash_v2 keeps the output unnormalised until the end.
- *The log-sum-exp alone* (section 3.1.1): m and l are kept apart here, but the backward needs only m + log l. The operation
  returns that sum, and Algorithm 4 takes it here.
- *delta once* (Algorithm 4, line 19): every tile of keys computes rowsum(dO ∘ O) again here.

The output waits in float32 (Algorithm 1 names no dtype). So does Algorithm 4's dQ, which is therefore rounded once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .asked import Asked, for_backward, numbers_for_kernels
from .documents import tensors_for_kernels
from .jit import INTERPRET
from .launch import launch, refusal, warn_once
from .layout import heads_last
from .tile_ops import (
    LN2,
    LOG2E,
    dot,
    interval,
    load_tile,
    move,
    round_to,
    store_tile,
    tanh,
    tile_offsets,
    with_distance,
    within,
)
from .tiles import tiles_v1


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, features: frozenset[str]) -> str | None:
    """Why this rung cannot run, or None: it takes all of attention's arguments."""
    return refusal("flash_v1", device, dtype, head_dim)


@triton.jit
def _forward_kernel(
    Q, K, V, O, L, M, OUT, LSE, FIRST, LAST, SLOPES,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_outb, stride_outh, stride_outn,
    n_head, seq_q, seq_k, scale, behind, ahead, cap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Algorithm 1. One program: one query head.

    It loops over tiles of keys and values (in shared memory), and for each over the tiles of queries that see any of it. The
    scores of one pair of tiles live in registers; output O, row sums L and row maxima M (base 2) are read from memory, updated
    and written back. A barrier separates one tile of keys from the next, since a thread may read what another one wrote.
    """
    batch = (tl.program_id(0) // n_head).to(tl.int64)
    head = (tl.program_id(0) % n_head).to(tl.int64)
    slope = None
    if SLOPES is not None:
        slope = tl.load(SLOPES + head) / scale
    if FIRST is not None:
        FIRST += batch * seq_q
        LAST += batch * seq_q
    q_base = Q + batch * stride_qb + head * stride_qh
    k_base = K + batch * stride_kb + head // GROUP * stride_kh
    v_base = V + batch * stride_vb + head // GROUP * stride_vh
    o_base = O + batch * stride_ob + head * stride_oh
    out_base = OUT + batch * stride_outb + head * stride_outh
    per_head = (batch * n_head + head) * seq_q
    q_offsets = tile_offsets(BLOCK_Q, BLOCK_D, stride_qn, WIDE)
    o_offsets = tile_offsets(BLOCK_Q, BLOCK_D, stride_on, WIDE)

    for first_col in range(0, seq_k, BLOCK_K):  # lines 5 and 6
        cols = first_col + tl.arange(0, BLOCK_K)
        k_offsets = tile_offsets(BLOCK_K, BLOCK_D, stride_kn, WIDE)
        v_offsets = tile_offsets(BLOCK_K, BLOCK_D, stride_vn, WIDE)
        k = load_tile(move(k_base, first_col, stride_kn), k_offsets, cols, seq_k, HEAD_DIM, BLOCK_D, True)
        v = load_tile(move(v_base, first_col, stride_vn), v_offsets, cols, seq_k, HEAD_DIM, BLOCK_D, True)
        start, _ = interval(first_col, seq_k, seq_q, seq_q - seq_k, ahead, behind, FIRST, LAST)
        _, end = interval(first_col + BLOCK_K - 1, seq_k, seq_q, seq_q - seq_k, ahead, behind, FIRST, LAST)
        for first_row in range(start // BLOCK_Q * BLOCK_Q, end + 1, BLOCK_Q):  # lines 7 and 8
            rows = first_row + tl.arange(0, BLOCK_Q)
            inside = rows < seq_q
            q = load_tile(move(q_base, first_row, stride_qn), q_offsets, rows, seq_q, HEAD_DIM, BLOCK_D, True)
            o = load_tile(move(o_base, first_row, stride_on), o_offsets, rows, seq_q, HEAD_DIM, BLOCK_D, True)
            l = tl.load(L + per_head + rows, mask=inside, other=0.0)
            m = tl.load(M + per_head + rows, mask=inside, other=float("-inf"))
            s = dot(q, tl.trans(k), None, PRECISION)  # line 9
            if cap is not None:
                s = cap * tanh(s / cap, q.dtype == tl.float32)
            if slope is not None:
                s = with_distance(s, slope, rows[:, None] + (seq_k - seq_q), cols[None, :])
            first, last = interval(rows, seq_q, seq_k, seq_k - seq_q, behind, ahead, FIRST, LAST)
            s = tl.where(within(cols[None, :], first, last, True, True), s * (scale * LOG2E), float("-inf"))
            m_tile = tl.max(s, 1)  # line 10
            m_new = tl.maximum(m, m_tile)  # line 11
            finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf would be NaN
            p = tl.exp2(s - finite[:, None])
            l_old = tl.exp2(m - finite) * l
            l_new = l_old + tl.sum(p, 1)
            # Line 12. The paper shifts p by the tile's own maximum and multiplies it by the difference. A shift by m_new at once
            # gives the same number.
            o = dot(round_to(p, v.dtype), v, o * l_old[:, None], PRECISION) / tl.where(l_new > 0, l_new, 1.0)[:, None]
            store_tile(move(o_base, first_row, stride_on), o_offsets, o, rows, seq_q, HEAD_DIM, BLOCK_D)
            tl.store(L + per_head + rows, l_new, mask=inside)  # line 13
            tl.store(M + per_head + rows, m_new, mask=inside)
        tl.debug_barrier()

    for first_row in range(0, seq_q, BLOCK_Q):
        rows = first_row + tl.arange(0, BLOCK_Q)
        inside = rows < seq_q
        o = load_tile(move(o_base, first_row, stride_on), o_offsets, rows, seq_q, HEAD_DIM, BLOCK_D, True)
        l = tl.load(L + per_head + rows, mask=inside, other=1.0)
        l = tl.where(l > 0, l, 1.0)  # a row that saw no key: m is -inf, and so is its log-sum-exp
        m = tl.load(M + per_head + rows, mask=inside, other=0.0)
        out_offsets = tile_offsets(BLOCK_Q, BLOCK_D, stride_outn, WIDE)
        store_tile(move(out_base, first_row, stride_outn), out_offsets, o, rows, seq_q, HEAD_DIM, BLOCK_D)
        tl.store(LSE + per_head + rows, (m + tl.log2(l)) * LN2, mask=inside)


@triton.jit
def _backward_kernel(
    Q, K, V, O, LSE, DO, DLSE, DQ, DK, DV, FIRST, LAST, SLOPES,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_dob, stride_doh, stride_don, stride_dqb, stride_dqh, stride_dqn,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    n_kv_head, seq_q, seq_k, scale, behind, ahead, cap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Algorithm 4. One program: one key/value head and the query heads that share it.

    It loops over tiles of keys and values, whose gradients live in registers, and for each over the tiles of queries that see any
    of it, whose gradient DQ is read from memory, added to and written back.
    """
    batch = (tl.program_id(0) // n_kv_head).to(tl.int64)
    kv_head = (tl.program_id(0) % n_kv_head).to(tl.int64)
    if FIRST is not None:
        FIRST += batch * seq_q
        LAST += batch * seq_q
    k_base = K + batch * stride_kb + kv_head * stride_kh
    v_base = V + batch * stride_vb + kv_head * stride_vh
    dk_base = DK + batch * stride_dkb + kv_head * stride_dkh
    dv_base = DV + batch * stride_dvb + kv_head * stride_dvh
    for first_col in range(0, seq_k, BLOCK_K):  # lines 6 and 7
        cols = first_col + tl.arange(0, BLOCK_K)
        k_offsets = tile_offsets(BLOCK_K, BLOCK_D, stride_kn, WIDE)
        v_offsets = tile_offsets(BLOCK_K, BLOCK_D, stride_vn, WIDE)
        k = load_tile(move(k_base, first_col, stride_kn), k_offsets, cols, seq_k, HEAD_DIM, BLOCK_D, True)
        v = load_tile(move(v_base, first_col, stride_vn), v_offsets, cols, seq_k, HEAD_DIM, BLOCK_D, True)
        dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)  # line 8
        dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        start, _ = interval(first_col, seq_k, seq_q, seq_q - seq_k, ahead, behind, FIRST, LAST)
        _, end = interval(first_col + BLOCK_K - 1, seq_k, seq_q, seq_q - seq_k, ahead, behind, FIRST, LAST)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            q_base = Q + batch * stride_qb + head * stride_qh
            o_base = O + batch * stride_ob + head * stride_oh
            do_base = DO + batch * stride_dob + head * stride_doh
            dq_base = DQ + batch * stride_dqb + head * stride_dqh
            per_head = (batch * n_kv_head * GROUP + head) * seq_q
            slope = None
            if SLOPES is not None:
                slope = tl.load(SLOPES + head) / scale
            for first_row in range(start // BLOCK_Q * BLOCK_Q, end + 1, BLOCK_Q):  # lines 9 and 10
                rows = first_row + tl.arange(0, BLOCK_Q)
                q_offsets = tile_offsets(BLOCK_Q, BLOCK_D, stride_qn, WIDE)
                o_offsets = tile_offsets(BLOCK_Q, BLOCK_D, stride_on, WIDE)
                do_offsets = tile_offsets(BLOCK_Q, BLOCK_D, stride_don, WIDE)
                dq_offsets = tile_offsets(BLOCK_Q, BLOCK_D, stride_dqn, WIDE)
                q = load_tile(move(q_base, first_row, stride_qn), q_offsets, rows, seq_q, HEAD_DIM, BLOCK_D, True)
                o = load_tile(move(o_base, first_row, stride_on), o_offsets, rows, seq_q, HEAD_DIM, BLOCK_D, True)
                do = load_tile(move(do_base, first_row, stride_don), do_offsets, rows, seq_q, HEAD_DIM, BLOCK_D, True)
                delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # line 19
                if DLSE is not None:  # d lse / d s = p: the gradient of the log-sum-exp enters here
                    delta -= tl.load(DLSE + per_head + rows, mask=rows < seq_q, other=0.0)
                do = do.to(q.dtype)
                lse = tl.load(LSE + per_head + rows, mask=rows < seq_q, other=float("inf")) * LOG2E
                s = dot(q, tl.trans(k), None, PRECISION)  # line 11
                if cap is not None:
                    bent = tanh(s / cap, q.dtype == tl.float32)
                    s = cap * bent
                if slope is not None:
                    s = with_distance(s, slope, rows[:, None] + (seq_k - seq_q), cols[None, :])
                first, last = interval(rows, seq_q, seq_k, seq_k - seq_q, behind, ahead, FIRST, LAST)
                seen = within(cols[None, :], first, last, True, True)
                p = tl.where(seen, tl.exp2(s * (scale * LOG2E) - lse[:, None]), 0.0)  # lines 12 and 13
                dv = dot(tl.trans(round_to(p, do.dtype)), do, dv, PRECISION)  # line 16
                dp = dot(do, tl.trans(v), None, PRECISION)  # line 17
                ds = p * (dp - delta[:, None])  # line 20
                if cap is not None:
                    ds = ds * (1.0 - bent * bent)
                ds = round_to(ds, q.dtype)
                dq = load_tile(move(dq_base, first_row, stride_dqn), dq_offsets, rows, seq_q, HEAD_DIM, BLOCK_D, True)
                dq += dot(ds, k, None, PRECISION) * scale  # line 21
                store_tile(move(dq_base, first_row, stride_dqn), dq_offsets, dq, rows, seq_q, HEAD_DIM, BLOCK_D)
                dk = dot(tl.trans(ds), q, dk, PRECISION)  # line 22
        dk_offsets = tile_offsets(BLOCK_K, BLOCK_D, stride_dkn, WIDE)
        dv_offsets = tile_offsets(BLOCK_K, BLOCK_D, stride_dvn, WIDE)
        store_tile(move(dk_base, first_col, stride_dkn), dk_offsets, dk * scale, cols, seq_k, HEAD_DIM, BLOCK_D)  # line 24
        store_tile(move(dv_base, first_col, stride_dvn), dv_offsets, dv, cols, seq_k, HEAD_DIM, BLOCK_D)
        tl.debug_barrier()


# ---- the launches ----


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    asked: Asked,
    *,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Sq, D] (in memory [B, Sq, Hq, D]; in `output_dtype`, by default the inputs') and lse [B, Hq, Sq] float32.

    `attention` has checked what is asked; its scale is positive.
    """
    if INTERPRET:
        warn_once("flash_v1")
    batch, n_head, seq_q, head_dim = query.shape
    n_kv_head, seq_k = key.shape[1], key.shape[2]
    output = heads_last(query, output_dtype)
    lse = torch.empty((batch, n_head, seq_q), device=query.device, dtype=torch.float32)
    if output.numel() == 0:
        return output, lse
    numbers = numbers_for_kernels(asked, seq_q, seq_k)
    # Line 2: output 0, row sums 0, row maxima -inf.
    running = torch.zeros(query.shape, device=query.device, dtype=torch.float32)
    row_sum, row_max = torch.zeros_like(lse), torch.full_like(lse, -math.inf)
    tile = tiles_v1(query.device, query.dtype, head_dim, seq_q, seq_k).forward
    launch(
        _forward_kernel, tile, (batch * n_head, 1, 1),
        (query, key, value, running, row_sum, row_max, output, lse, *tensors_for_kernels(asked, query.device)),
        (query, key, value, running, output), (n_head, seq_q, seq_k), numbers, n_head // n_kv_head,
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
    asked: Asked,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in their dtypes, in memory [B, S, H, D]; the same bits every time, asked for or not."""
    batch, n_head, seq_q, head_dim = query.shape
    n_kv_head, seq_k = key.shape[1], key.shape[2]
    dq, dk, dv = heads_last(query), heads_last(key), heads_last(value)
    if query.numel() == 0 or seq_k == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad_output, grad_lse, query, key, value, output, lse = for_backward(
        grad_output, grad_lse, query, key, value, output, lse, asked
    )
    numbers = numbers_for_kernels(asked, seq_q, seq_k)
    running = torch.zeros(query.shape, device=query.device, dtype=torch.float32)  # line 5
    tile = tiles_v1(query.device, query.dtype, head_dim, seq_q, seq_k).backward
    more = tensors_for_kernels(asked, query.device)
    launch(
        _backward_kernel, tile, (batch * n_kv_head, 1, 1),
        (query, key, value, output, lse, grad_output, grad_lse, running, dk, dv, *more),
        (query, key, value, output, grad_output, running, dk, dv), (n_kv_head, seq_q, seq_k), numbers, n_head // n_kv_head,
    )  # fmt: skip
    return dq.copy_(running), dk, dv
