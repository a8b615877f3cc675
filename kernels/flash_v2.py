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

import torch
import triton
import triton.language as tl
from torch import Tensor

from .asked import Asked, for_backward, numbers_for_kernels
from .documents import tensors_for_kernels
from .flash_v2_backward import dkdv_kernel, dq_kernel
from .jit import INTERPRET
from .launch import grid, launch, refusal, warn_once
from .layout import heads_last
from .tile_ops import (
    ALL,
    LN2,
    LOG2E,
    LOWEST,
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
from .tiles import Tiles, tiles


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, features: frozenset[str]) -> str | None:
    """Why this rung cannot run, or None: it takes all of attention's arguments."""
    return refusal("flash_v2", device, dtype, head_dim)


# ---- the kernels ----


@triton.jit
def _forward_mainloop(
    acc, l, m, q, k_base, v_base, k_offsets, v_offsets, positions, first, last, start, stop, all_from, all_to, seq_k,
    stride_kn, stride_vn, qk_scale, cap, slope,
    MASK: tl.constexpr, CHECK: tl.constexpr, FROM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for first_col in range(start, stop, BLOCK_K):
        cols = first_col + tl.arange(0, BLOCK_K)
        k = load_tile(move(k_base, first_col, stride_kn), k_offsets, cols, seq_k, HEAD_DIM, BLOCK_D, CHECK)
        s = dot(q, tl.trans(k), None, PRECISION)
        if cap is not None:
            s = cap * tanh(s / cap, q.dtype == tl.float32)
        if slope is not None:
            s = with_distance(s, slope, positions[:, None], cols[None, :])
        if MASK != NONE and (MASK == ALL or first_col < all_from or first_col + BLOCK_K > all_to + 1):
            s = tl.where(within(cols[None, :], first, last, FROM, True), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # The exponent is taken of the difference, which is zero where m stays. The difference of two products, one of them fused,
        # would leave a rounding error, the same in every tile, and a thousand tiles would multiply it up.
        rescale = tl.exp2((m - m_new) * qk_scale)
        shift = m_new * qk_scale
        p = tl.exp2(s * qk_scale - shift[:, None])
        l = l * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        v = load_tile(move(v_base, first_col, stride_vn), v_offsets, cols, seq_k, HEAD_DIM, BLOCK_D, CHECK)
        acc = dot(round_to(p, v.dtype), v, acc, PRECISION)
        m = m_new
    return acc, l, m


@triton.jit
def _forward_kernel(
    Q, K, V, O, LSE, FIRST, LAST, SLOPES,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    n_head, seq_q, seq_k, scale, behind, ahead, cap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, RAGGED: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """One program: a tile of BLOCK_Q queries of one head.

    It loops over tiles of BLOCK_K keys and values, streamed through shared memory: those that every row sees whole, then those
    that the diagonal or the end cuts. A window or documents cut at both ends; for them one loop masks where a bound cuts. The loops
    skip tiles that no row sees. The queries stay in shared memory; the scores of one tile, the unnormalised output, m and l live in
    registers. Tiles of a head are neighbours, the longest first, so that they share K and V through L2 and short ones make up the
    last wave.
    """
    n_tile = tl.cdiv(seq_q, BLOCK_Q)
    tile, head, batch = own_tile(n_tile, n_head, FLAT)
    first_row = (n_tile - 1 - tile) * BLOCK_Q
    rows = first_row + tl.arange(0, BLOCK_Q)
    qk_scale = scale * LOG2E
    slope = None
    if SLOPES is not None:
        slope = tl.load(SLOPES + head) / scale
    if FIRST is not None:
        FIRST += batch * seq_q
        LAST += batch * seq_q

    q_base = Q + batch * stride_qb + head * stride_qh + first_row.to(tl.int64) * stride_qn
    k_base = K + batch * stride_kb + head // GROUP * stride_kh
    v_base = V + batch * stride_vb + head // GROUP * stride_vh
    q = load_tile(q_base, tile_offsets(BLOCK_Q, BLOCK_D, stride_qn, WIDE), rows, seq_q, HEAD_DIM, BLOCK_D, True)
    k_offsets = tile_offsets(BLOCK_K, BLOCK_D, stride_kn, WIDE)
    v_offsets = tile_offsets(BLOCK_K, BLOCK_D, stride_vn, WIDE)

    FROM: tl.constexpr = behind is not None or FIRST is not None
    start, all_to = interval(first_row, seq_q, seq_k, seq_k - seq_q, behind, ahead, FIRST, LAST)
    all_from, end = interval(first_row + BLOCK_Q - 1, seq_q, seq_k, seq_k - seq_q, behind, ahead, FIRST, LAST)

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)
    m = tl.full([BLOCK_Q], LOWEST, tl.float32)
    positions = rows + (seq_k - seq_q)
    if FROM:
        first, last = interval(rows, seq_q, seq_k, seq_k - seq_q, behind, ahead, FIRST, LAST)
        acc, l, m = _forward_mainloop(
            acc, l, m, q, k_base, v_base, k_offsets, v_offsets, positions, first, last, start // BLOCK_K * BLOCK_K, end + 1,
            all_from, all_to, seq_k, stride_kn, stride_vn, qk_scale, cap, slope,
            SOME, RAGGED, FROM, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION,
        )  # fmt: skip
    else:
        cut = tl.maximum(all_to + 1, 0) // BLOCK_K * BLOCK_K
        acc, l, m = _forward_mainloop(
            acc, l, m, q, k_base, v_base, k_offsets, v_offsets, positions, None, None, 0, cut, 0, 0, seq_k,
            stride_kn, stride_vn, qk_scale, cap, slope, NONE, False, FROM, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION,
        )  # fmt: skip
        if ahead is not None or RAGGED:
            _, last = interval(rows, seq_q, seq_k, seq_k - seq_q, behind, ahead, FIRST, LAST)
            acc, l, m = _forward_mainloop(
                acc, l, m, q, k_base, v_base, k_offsets, v_offsets, positions, None, last, cut, end + 1, 0, 0, seq_k,
                stride_kn, stride_vn, qk_scale, cap, slope, ALL, RAGGED, FROM, HEAD_DIM, BLOCK_D, BLOCK_K, PRECISION,
            )  # fmt: skip

    blind = l == 0.0  # rows that see no key: output 0, log-sum-exp -inf
    l = tl.where(blind, 1.0, l)
    o = acc * (1.0 / l)[:, None]
    lse = tl.where(blind, float("-inf"), (m * qk_scale + tl.log2(l)) * LN2)
    o_base = O + batch * stride_ob + head * stride_oh + first_row.to(tl.int64) * stride_on
    store_tile(o_base, tile_offsets(BLOCK_Q, BLOCK_D, stride_on, WIDE), o, rows, seq_q, HEAD_DIM, BLOCK_D)
    tl.store(LSE + (batch * n_head + head) * seq_q + rows, lse, mask=rows < seq_q)


# ---- the launches ----


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    asked: Asked,
    *,
    output_dtype: torch.dtype | None = None,
    use: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Sq, D] (in memory [B, Sq, Hq, D]; in `output_dtype`, by default the inputs') and lse [B, Hq, Sq] float32.

    `attention` has checked what is asked; its scale is positive. `use` replaces the table's tiles.
    """
    if INTERPRET:
        warn_once("flash_v2")
    batch, n_head, seq_q, head_dim = query.shape
    n_kv_head, seq_k = key.shape[1], key.shape[2]
    output = heads_last(query, output_dtype)
    lse = torch.empty((batch, n_head, seq_q), device=query.device, dtype=torch.float32)
    if output.numel() == 0 or seq_k == 0:
        return output.zero_(), lse.fill_(-math.inf)
    numbers = numbers_for_kernels(asked, seq_q, seq_k)
    tile = (use or tiles(query.device, query.dtype, head_dim, seq_q, seq_k)).forward
    programs, flat = grid(-(-seq_q // tile.block_q), n_head, batch)
    launch(
        _forward_kernel, tile, programs,
        (query, key, value, output, lse, *tensors_for_kernels(asked, query.device)), (query, key, value, output),
        (n_head, seq_q, seq_k), numbers, n_head // n_kv_head, RAGGED=seq_k % tile.block_k != 0, FLAT=flat,
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
    *,
    use: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in their dtypes, in memory [B, S, H, D]; the same bits every time, asked for or not.

    `output` and `lse` may come from several forwards merged (ring attention): they enter only delta and the probabilities.
    """
    batch, n_head, seq_q, head_dim = query.shape
    n_kv_head, seq_k = key.shape[1], key.shape[2]
    dq, dk, dv = heads_last(query), heads_last(key), heads_last(value)
    if query.numel() == 0 or seq_k == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad_output, grad_lse, query, key, value, output, lse = for_backward(
        grad_output, grad_lse, query, key, value, output, lse, asked
    )
    delta = torch.empty_like(lse)
    numbers = numbers_for_kernels(asked, seq_q, seq_k)
    more = tensors_for_kernels(asked, query.device)
    cut = asked.window_size is not None or asked.document_ids is not None
    chosen, group = use or tiles(query.device, query.dtype, head_dim, seq_q, seq_k, cut), n_head // n_kv_head
    tile = chosen.dq
    programs, flat = grid(-(-seq_q // tile.block_q), n_head, batch)
    launch(
        dq_kernel, tile, programs,
        (query, key, value, output, lse, grad_output, grad_lse, dq, delta, *more), (query, key, value, output, grad_output, dq),
        (n_head, seq_q, seq_k), numbers, group, RAGGED=seq_k % tile.block_k != 0, FLAT=flat,
    )  # fmt: skip
    tile = chosen.dkdv
    programs, flat = grid(-(-seq_k // tile.block_k), n_kv_head, batch)
    launch(
        dkdv_kernel, tile, programs,
        (query, key, value, lse, grad_output, delta, dk, dv, *more), (query, key, value, grad_output, dk, dv),
        (n_kv_head, seq_q, seq_k), numbers, group, RAGGED=seq_q % tile.block_q != 0, FLAT=flat,
    )  # fmt: skip
    return dq, dk, dv
