"""flash_v2's backward kernels: one owns the tiles of dQ, the other those of dK and dV.

The letters are those of flash_v2.py. Both recompute the probabilities from the log-sum-exp (Dao, 2023, Algorithm 2, line 11).
"""

import triton
import triton.language as tl

from .tile_ops import (
    ALL,
    LOG2E,
    NONE,
    SOME,
    dot,
    interval,
    load_tile,
    move,
    own_tile,
    round_to,
    store_tile,
    tanh,
    tile_offsets,
    with_distance,
    within,
)


@triton.jit
def _dq_mainloop(
    dq, q, do, lse, delta, k_base, v_base, k_offsets, v_offsets, positions, first, last, start, stop, all_from, all_to, seq_k,
    stride_kn, stride_vn, qk_scale, cap, slope,
    MASK: tl.constexpr, CHECK: tl.constexpr, FROM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for first_col in range(start, stop, BLOCK_K):
        cols = first_col + tl.arange(0, BLOCK_K)
        k = load_tile(move(k_base, first_col, stride_kn), k_offsets, cols, seq_k, HEAD_DIM, BLOCK_D, CHECK)
        v = load_tile(move(v_base, first_col, stride_vn), v_offsets, cols, seq_k, HEAD_DIM, BLOCK_D, CHECK)
        s = dot(q, tl.trans(k), None, PRECISION)
        if cap is not None:
            bent = tanh(s / cap, q.dtype == tl.float32)
            s = cap * bent
        if slope is not None:
            s = with_distance(s, slope, positions[:, None], cols[None, :])
        p = tl.exp2(s * qk_scale - lse[:, None])
        if MASK != NONE and (MASK == ALL or first_col < all_from or first_col + BLOCK_K > all_to + 1):
            p = tl.where(within(cols[None, :], first, last, FROM, True), p, 0.0)
        dp = dot(do, tl.trans(v), None, PRECISION)
        ds = p * (dp - delta[:, None])
        if cap is not None:
            ds = ds * (1.0 - bent * bent)
        dq = dot(round_to(ds, k.dtype), k, dq, PRECISION)
    return dq


@triton.jit
def dq_kernel(
    Q, K, V, O, LSE, DO, DLSE, DQ, DELTA, FIRST, LAST, SLOPES,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_dob, stride_doh, stride_don, stride_dqb, stride_dqh, stride_dqn,
    n_head, seq_q, seq_k, scale, behind, ahead, cap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, RAGGED: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of a tile of BLOCK_Q queries, and their delta, which the dK/dV kernel reads.

    It loops over the same tiles of keys and values as the forward, in the same order. q and do stay in shared memory; s, dp and
    the gradient live in registers. The gradient of the log-sum-exp enters through delta, since d lse / d s = p.
    """
    n_tile = tl.cdiv(seq_q, BLOCK_Q)
    tile, head, batch = own_tile(n_tile, n_head, FLAT)
    first_row = (n_tile - 1 - tile) * BLOCK_Q
    rows = first_row + tl.arange(0, BLOCK_Q)
    begin = first_row.to(tl.int64)
    slope = None
    if SLOPES is not None:
        slope = tl.load(SLOPES + head) / scale
    if FIRST is not None:
        FIRST += batch * seq_q
        LAST += batch * seq_q

    q_base = Q + batch * stride_qb + head * stride_qh + begin * stride_qn
    o_base = O + batch * stride_ob + head * stride_oh + begin * stride_on
    do_base = DO + batch * stride_dob + head * stride_doh + begin * stride_don
    per_row = (batch * n_head + head) * seq_q + rows
    # All loads first, so that their latencies overlap.
    o = load_tile(o_base, tile_offsets(BLOCK_Q, BLOCK_D, stride_on, WIDE), rows, seq_q, HEAD_DIM, BLOCK_D, True)
    do = load_tile(do_base, tile_offsets(BLOCK_Q, BLOCK_D, stride_don, WIDE), rows, seq_q, HEAD_DIM, BLOCK_D, True)
    q = load_tile(q_base, tile_offsets(BLOCK_Q, BLOCK_D, stride_qn, WIDE), rows, seq_q, HEAD_DIM, BLOCK_D, True)
    lse = tl.load(LSE + per_row, mask=rows < seq_q, other=float("inf")) * LOG2E
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if DLSE is not None:
        delta -= tl.load(DLSE + per_row, mask=rows < seq_q, other=0.0)
    tl.store(DELTA + per_row, delta, mask=rows < seq_q)
    do = do.to(q.dtype)
    k_base = K + batch * stride_kb + head // GROUP * stride_kh
    v_base = V + batch * stride_vb + head // GROUP * stride_vh
    k_offsets = tile_offsets(BLOCK_K, BLOCK_D, stride_kn, WIDE)
    v_offsets = tile_offsets(BLOCK_K, BLOCK_D, stride_vn, WIDE)

    FROM: tl.constexpr = behind is not None or FIRST is not None
    start, all_to = interval(first_row, seq_q, seq_k, seq_k - seq_q, behind, ahead, FIRST, LAST)
    all_from, end = interval(first_row + BLOCK_Q - 1, seq_q, seq_k, seq_k - seq_q, behind, ahead, FIRST, LAST)

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    positions = rows + (seq_k - seq_q)
    if FROM:
        first, last = interval(rows, seq_q, seq_k, seq_k - seq_q, behind, ahead, FIRST, LAST)
        dq = _dq_mainloop(
            dq, q, do, lse, delta, k_base, v_base, k_offsets, v_offsets, positions, first, last, start // BLOCK_K * BLOCK_K,
            end + 1, all_from, all_to, seq_k, stride_kn, stride_vn, scale * LOG2E, cap, slope,
            SOME, RAGGED, FROM, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION,
        )  # fmt: skip
    else:
        cut = tl.maximum(all_to + 1, 0) // BLOCK_K * BLOCK_K
        dq = _dq_mainloop(
            dq, q, do, lse, delta, k_base, v_base, k_offsets, v_offsets, positions, None, None, 0, cut, 0, 0, seq_k,
            stride_kn, stride_vn, scale * LOG2E, cap, slope, NONE, False, FROM, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION,
        )  # fmt: skip
        if ahead is not None or RAGGED:
            _, last = interval(rows, seq_q, seq_k, seq_k - seq_q, behind, ahead, FIRST, LAST)
            dq = _dq_mainloop(
                dq, q, do, lse, delta, k_base, v_base, k_offsets, v_offsets, positions, None, last, cut, end + 1, 0, 0, seq_k,
                stride_kn, stride_vn, scale * LOG2E, cap, slope, ALL, RAGGED, FROM, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION,
            )  # fmt: skip
    dq_base = DQ + batch * stride_dqb + head * stride_dqh + begin * stride_dqn
    store_tile(dq_base, tile_offsets(BLOCK_Q, BLOCK_D, stride_dqn, WIDE), dq * scale, rows, seq_q, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkdv_mainloop(
    dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_offsets, do_offsets, cols, first, last, start, stop, all_from, all_to,
    seq_q, shift, stride_qn, stride_don, qk_scale, cap, slope,
    MASK: tl.constexpr, CHECK: tl.constexpr, TO: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for first_row in range(start, stop, BLOCK_Q):
        rows = first_row + tl.arange(0, BLOCK_Q)
        q = load_tile(move(q_base, first_row, stride_qn), q_offsets, rows, seq_q, HEAD_DIM, BLOCK_D, CHECK)
        do = load_tile(move(do_base, first_row, stride_don), do_offsets, rows, seq_q, HEAD_DIM, BLOCK_D, CHECK).to(q.dtype)
        if CHECK:  # rows beyond the end: an infinite log-sum-exp makes their probabilities zero
            lse = tl.load(lse_base + rows, mask=rows < seq_q, other=float("inf")) * LOG2E
            delta = tl.load(delta_base + rows, mask=rows < seq_q, other=0.0)
        else:
            lse = tl.load(lse_base + rows) * LOG2E
            delta = tl.load(delta_base + rows)
        # Transposed, keys by queries, so that p and ds enter the next products straight from registers.
        s = dot(k, tl.trans(q), None, PRECISION)
        if cap is not None:
            bent = tanh(s / cap, q.dtype == tl.float32)
            s = cap * bent
        if slope is not None:
            s = with_distance(s, slope, rows[None, :] + shift, cols[:, None])
        p = tl.exp2(s * qk_scale - lse[None, :])
        # Keys beyond the end need no mask: their gradients are not written.
        if MASK and (first_row < all_from or first_row + BLOCK_Q > all_to + 1):
            p = tl.where(within(rows[None, :], first, last, True, TO), p, 0.0)
        dv = dot(round_to(p, do.dtype), do, dv, PRECISION)
        dp = dot(v, tl.trans(do), None, PRECISION)
        ds = p * (dp - delta[None, :])
        if cap is not None:
            ds = ds * (1.0 - bent * bent)
        dk = dot(round_to(ds, q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def dkdv_kernel(
    Q, K, V, LSE, DO, DELTA, DK, DV, FIRST, LAST, SLOPES,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_don, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    n_kv_head, seq_q, seq_k, scale, behind, ahead, cap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, RAGGED: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of a tile of BLOCK_K keys and values of one key/value head.

    It loops over the query heads of the group, and for each over the tiles of queries that see any of these keys, masked where a
    bound cuts. k and v stay in shared memory; s and dp (transposed) and both gradients live in registers, so the sum over the
    group needs no atomics.
    """
    n_tile = tl.cdiv(seq_k, BLOCK_K)
    tile, kv_head, batch = own_tile(n_tile, n_kv_head, FLAT)
    first_col = tile * BLOCK_K  # the first keys are seen by the most queries: longest first
    cols = first_col + tl.arange(0, BLOCK_K)
    begin = first_col.to(tl.int64)
    if FIRST is not None:
        FIRST += batch * seq_k
        LAST += batch * seq_k

    k_base = K + batch * stride_kb + kv_head * stride_kh + begin * stride_kn
    v_base = V + batch * stride_vb + kv_head * stride_vh + begin * stride_vn
    k = load_tile(k_base, tile_offsets(BLOCK_K, BLOCK_D, stride_kn, WIDE), cols, seq_k, HEAD_DIM, BLOCK_D, True)
    v = load_tile(v_base, tile_offsets(BLOCK_K, BLOCK_D, stride_vn, WIDE), cols, seq_k, HEAD_DIM, BLOCK_D, True)
    q_offsets = tile_offsets(BLOCK_Q, BLOCK_D, stride_qn, WIDE)
    do_offsets = tile_offsets(BLOCK_Q, BLOCK_D, stride_don, WIDE)

    # `ahead` and `behind` swap places: a key is seen by the queries from `ahead` before it to `behind` after it.
    FROM: tl.constexpr = ahead is not None or FIRST is not None
    TO: tl.constexpr = behind is not None or FIRST is not None
    start, all_to = interval(first_col, seq_k, seq_q, seq_q - seq_k, ahead, behind, FIRST, LAST)
    all_from, end = interval(first_col + BLOCK_K - 1, seq_k, seq_q, seq_q - seq_k, ahead, behind, FIRST, LAST)
    start = start // BLOCK_Q * BLOCK_Q  # so that only the last tile of a sequence can be ragged

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_base = Q + batch * stride_qb + head * stride_qh
        do_base = DO + batch * stride_dob + head * stride_doh
        lse_base = LSE + (batch * n_kv_head * GROUP + head) * seq_q
        delta_base = DELTA + (batch * n_kv_head * GROUP + head) * seq_q
        slope = None
        if SLOPES is not None:
            slope = tl.load(SLOPES + head) / scale
        first, last = interval(cols, seq_k, seq_q, seq_q - seq_k, ahead, behind, FIRST, LAST)
        # One loop, masked where a bound cuts: faster here than a masked loop before an unmasked one (docs/log.md).
        dk, dv = _dkdv_mainloop(
            dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_offsets, do_offsets, cols, first, last, start, end + 1,
            all_from, all_to, seq_q, seq_k - seq_q, stride_qn, stride_don, scale * LOG2E, cap, slope,
            FROM or TO or RAGGED, RAGGED, TO, HEAD_DIM, BLOCK_D, BLOCK_Q, PRECISION,
        )  # fmt: skip

    dk_base = DK + batch * stride_dkb + kv_head * stride_dkh + begin * stride_dkn
    dv_base = DV + batch * stride_dvb + kv_head * stride_dvh + begin * stride_dvn
    store_tile(dk_base, tile_offsets(BLOCK_K, BLOCK_D, stride_dkn, WIDE), dk * scale, cols, seq_k, HEAD_DIM, BLOCK_D)
    store_tile(dv_base, tile_offsets(BLOCK_K, BLOCK_D, stride_dvn, WIDE), dv, cols, seq_k, HEAD_DIM, BLOCK_D)
