"""What runs before and after flash_v3's backward kernel, in Triton.

    preprocess     O, dO, lse  ->  row statistics for the backward kernel; a sum of zeros for dQ; counters of zero
    postprocess    dQ's sum, as the threads held it  ->  dQ in rows, scaled, in the inputs' dtype

dQ is added up in float32, tile by tile of 64 queries, [B * Hq * tiles, 64 * BLOCK_D] with head_dim rounded up to BLOCK_D.
"""

import triton
import triton.language as tl

from ..tile_ops import LOG2E, load_tile, store_tile, tile_offsets


@triton.jit
def of_8(stride):
    """Tells the compiler that a stride is a multiple of 8 elements: `reachable` has made sure of it."""
    return tl.multiple_of(stride, 8)


STRIDES = [f"stride_{x}{axis}" for x in ("o", "do", "dq") for axis in "bhn"]


@triton.jit(do_not_specialize=[*STRIDES, "n_head", "seq_q"], do_not_specialize_on_alignment=["LSE", "DLSE"])
def preprocess_kernel(
    O, DO, LSE, DLSE, STATS, DQ, COUNTER,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_on: tl.int64, stride_dob: tl.int64, stride_doh: tl.int64, stride_don: tl.int64,
    n_head, seq_q,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """One program: a tile of queries. Writes its statistics, one row [log-sum-exp in base 2 | delta], clears dQ and its counter.

    Rows that see no key, and rows beyond the end, get an infinite log-sum-exp: their probabilities are zero.
    """
    if tl.program_id(0) == 0:
        tl.store(COUNTER, 0)
    tl.store(COUNTER + 1 + tl.program_id(0), 0)
    n_tile = tl.cdiv(seq_q, QUERIES)
    tile = tl.program_id(0) % n_tile
    batch = (tl.program_id(0) // n_tile // n_head).to(tl.int64)
    head = (tl.program_id(0) // n_tile % n_head).to(tl.int64)
    rows = tile * QUERIES + tl.arange(0, QUERIES)
    begin = (tile * QUERIES).to(tl.int64)
    o_base = O + batch * of_8(stride_ob) + head * of_8(stride_oh) + begin * of_8(stride_on)
    do_base = DO + batch * of_8(stride_dob) + head * of_8(stride_doh) + begin * of_8(stride_don)
    o = load_tile(o_base, tile_offsets(QUERIES, BLOCK_D, of_8(stride_on), True), rows, seq_q, HEAD_DIM, BLOCK_D, True)
    do = load_tile(do_base, tile_offsets(QUERIES, BLOCK_D, of_8(stride_don), True), rows, seq_q, HEAD_DIM, BLOCK_D, True)
    per_row = (batch * n_head + head) * seq_q + rows
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if DLSE is not None:
        delta -= tl.load(DLSE + per_row, mask=rows < seq_q, other=0.0)
    lse = tl.load(LSE + per_row, mask=rows < seq_q, other=float("-inf")) * LOG2E
    stats = STATS + tl.program_id(0).to(tl.int64) * (2 * QUERIES) + tl.arange(0, QUERIES)
    tl.store(stats, tl.where(lse == float("-inf"), float("inf"), lse))
    tl.store(stats + QUERIES, delta)
    all_of_it = tl.arange(0, QUERIES * BLOCK_D)
    tl.store(DQ + tl.program_id(0).to(tl.int64) * (QUERIES * BLOCK_D) + all_of_it, tl.zeros([QUERIES * BLOCK_D], tl.float32))


@triton.jit(do_not_specialize=[*STRIDES, "n_head", "seq_q"])
def postprocess_kernel(
    SUM, DQ, stride_dqb: tl.int64, stride_dqh: tl.int64, stride_dqn: tl.int64, n_head, seq_q, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """One program: a tile of queries. It brings the tile's sum into order, scales it and rounds it."""
    n_tile = tl.cdiv(seq_q, QUERIES)
    tile = tl.program_id(0) % n_tile
    batch = (tl.program_id(0) // n_tile // n_head).to(tl.int64)
    head = (tl.program_id(0) // n_tile % n_head).to(tl.int64)
    rows = tile * QUERIES + tl.arange(0, QUERIES)
    # As the threads held it, 64 columns at a time: [part, column / 8, row / 16, row % 8, column % 8 / 2, row / 8 % 2, column % 2].
    held = tl.load(SUM + tl.program_id(0).to(tl.int64) * (QUERIES * BLOCK_D) + tl.arange(0, QUERIES * BLOCK_D))
    dq = held.reshape([BLOCK_D // 64, 8, 4, 8, 4, 2, 2]).permute([2, 5, 3, 0, 1, 4, 6]).reshape([QUERIES, BLOCK_D])
    begin = (tile * QUERIES).to(tl.int64)
    base = DQ + batch * of_8(stride_dqb) + head * of_8(stride_dqh) + begin * of_8(stride_dqn)
    store_tile(base, tile_offsets(QUERIES, BLOCK_D, of_8(stride_dqn), True), dq * scale, rows, seq_q, HEAD_DIM, BLOCK_D)
