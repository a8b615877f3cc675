"""flash_v3's forward: FlashAttention-3 on Hopper, in Gluon.

Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision" (2024), sections 3.1 and 3.2. One
block per multiprocessor stays for the whole launch and draws tiles of queries from a counter. Inside it:

    producer    one warp. It draws the next tile, publishes where that is, and has TMA bring Q once and K and V block by block
                into rings of shared memory.
    consumers   two or three warpgroups, 64 queries each. Q K^T of the next block is issued before P V of this one, so that the
                softmax of one runs under the products of the other; named barriers pass the tensor cores from warpgroup to
                warpgroup ("ping-pong"), so that one's softmax runs under another's products. What the softmax leaves out is in
                flash_v3_softmax.py.

Tensors come through rank-4 descriptors [B, H, S, D] with any strides: rows beyond the end of a sequence are read as zero and never
written, and no read crosses into the next head. Blocks are walked from the last that a tile sees to the first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..tile_ops import LN2, LOG2E
from .hopper_ops import (
    barrier_at,
    draw,
    interval,
    seen_as,
    take,
    tanh_of_ratio,
    tma_load,
    tma_store,
    with_distance,
)
from .softmax import as_operand, beside_nothing, rescaled, softmax_of_first, softmax_of_next

# ---- whose turn it is at the tensor cores ----


@gluon.jit
def _take_tensor_cores(W: gl.constexpr):
    barrier_at("sync", 10 + W)


@gluon.jit
def _pass_tensor_cores(W: gl.constexpr, WARPGROUPS: gl.constexpr):
    barrier_at("arrive", 10 + (W + 1) % WARPGROUPS)


# ---- which tile, which keys ----


@gluon.jit
def _blocks(row, ROWS: gl.constexpr, BLOCK_K: gl.constexpr, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr):
    """First and last block of keys that any of the ROWS queries from `row` on sees (one at least), and those that all see."""
    start, all_to = interval(row, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr)
    all_from, end = interval(row + ROWS - 1, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr)
    lowest = start // BLOCK_K
    highest = gl.maximum(gl.maximum(end, 0) // BLOCK_K, lowest)
    return lowest, highest, gl.cdiv(all_from, BLOCK_K), gl.maximum(all_to + 1, 0) // BLOCK_K - 1


# ---- the producer ----


@gluon.jit
def _produce(
    shared, GROUP: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_K: gl.constexpr, HEAD_DIM: gl.constexpr, BUFFERS: gl.constexpr
):
    tensors, meaning, sizes, memory, rings, schedule = shared
    q_desc, k_desc, v_desc, _, _ = tensors
    first_ptr, last_ptr, _, _, behind, ahead, _ = meaning
    _, seq_q, seq_k, _, _, _, _ = sizes
    q_s, _, k_s, v_s = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    ROWS: gl.constexpr = WARPGROUPS * 64
    step = 0
    n = 0
    q_tile, batch, head = draw(schedule, n, sizes, FROM_LAST=True)  # with causality the longest first
    while q_tile >= 0:
        lowest, highest, whole_from, whole_to = _blocks(
            q_tile * ROWS, ROWS, BLOCK_K, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr
        )
        for i in range(highest - lowest + 1):
            slot = step % BUFFERS
            phase = (step // BUFFERS) & 1
            row = (highest - i) * BLOCK_K
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            tma_load(k_desc, [batch, head // GROUP, row, 0], k_full.index(slot), k_s.index(slot))
            if i == 0:
                for w in gl.static_range(WARPGROUPS):
                    mbarrier.wait(q_empty.index(w), (n & 1) ^ 1)
                    mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
                    tma_load(q_desc, [batch, head, q_tile * ROWS + 64 * w, 0], q_full.index(w), q_s.index(w))
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            tma_load(v_desc, [batch, head // GROUP, row, 0], v_full.index(slot), v_s.index(slot))
            step += 1
        n += 1
        q_tile, batch, head = draw(schedule, n, sizes, FROM_LAST=True)


# ---- the consumers ----


@gluon.jit
def _hand_on(steps, step, rings, W: gl.constexpr, WARPGROUPS: gl.constexpr, BUFFERS: gl.constexpr):
    """Blocks that other warpgroups see and this one does not: released unread."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    for _ in range(steps):
        slot = step % BUFFERS
        phase = (step // BUFFERS) & 1
        _take_tensor_cores(W)
        _pass_tensor_cores(W, WARPGROUPS)
        mbarrier.wait(k_full.index(slot), phase)
        mbarrier.arrive(k_empty.index(slot), count=1)
        mbarrier.wait(v_full.index(slot), phase)
        mbarrier.arrive(v_empty.index(slot), count=1)
        step += 1
    return step


@gluon.jit
def _bend(s, rows, cols, cap, slope):
    """Softcap and ALiBi, in units of the raw product."""
    if cap is not None:
        s = cap * tanh_of_ratio(s, cap)
    if slope is not None:
        s = with_distance(s, slope, rows, cols)
    return s


@gluon.jit
def _rows_of(s_layout: gl.constexpr, rows, first, last):
    """What belongs to the rows of S, as S's layout holds them."""
    row: gl.constexpr = gl.SliceLayout(1, s_layout)
    return gl.convert_layout(rows, row), gl.convert_layout(first, row), gl.convert_layout(last, row)


@gluon.jit
def _mask(s, cols, first, last, FROM: gl.constexpr):
    seen = cols[None, :] <= last[:, None]
    if FROM:
        seen = seen & (cols[None, :] >= first[:, None])
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def _steps(
    acc, l, m, p, block, steps, step, q, memory, rings, rows, first, last, qk_scale, cap, slope,
    W: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_K: gl.constexpr, HEAD_DIM: gl.constexpr, BUFFERS: gl.constexpr,
    MASKED: gl.constexpr, FROM: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Blocks from `block` downwards: scores of this one, then the product of the one before with its values, still owed.

    With two warpgroups the softmax also runs under the warpgroup's own P V. With three there are no registers for its P beside the
    next one, and the others' products suffice.
    """
    OVERLAP: gl.constexpr = WARPGROUPS == 2
    _, _, k_s, v_s = memory
    _, _, k_full, k_empty, v_full, v_empty = rings
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    dtype: gl.constexpr = k_s.dtype
    zero = gl.zeros([64, BLOCK_K], gl.float32, s_layout)
    for i in range(steps):
        owed = step % BUFFERS
        owed_phase = (step // BUFFERS) & 1
        step += 1
        slot = step % BUFFERS
        mbarrier.wait(k_full.index(slot), (step // BUFFERS) & 1)
        _take_tensor_cores(W)
        s_later = warpgroup_mma(q, k_s.index(slot).reshape([BLOCK_K, HEAD_DIM]).permute((1, 0)), zero, use_acc=False, is_async=True)
        if OVERLAP:
            # With zero, which the compiler cannot know: P has to leave the registers in which the next one is made.
            p = p ^ (step >> 31)
        p_now = as_operand(p, dtype, p_layout)
        mbarrier.wait(v_full.index(owed), owed_phase)
        o_later = warpgroup_mma(p_now, v_s.index(owed).reshape([BLOCK_K, HEAD_DIM]), acc, is_async=True)
        _pass_tensor_cores(W, WARPGROUPS)
        if OVERLAP:
            s = warpgroup_mma_wait(1, deps=(s_later,))
        else:
            s, acc = warpgroup_mma_wait(0, deps=(s_later, o_later))
            mbarrier.arrive(v_empty.index(owed), count=1)
        mbarrier.arrive(k_empty.index(slot), count=1)
        if MASKED or cap is not None or slope is not None:
            cols = (block - i) * BLOCK_K + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, s_layout))
            s = _bend(s, rows, cols, cap, slope)
            if MASKED:
                s = _mask(s, cols, first, last, FROM)
        p_next, m, l, rescale = softmax_of_next(s, m, l, qk_scale, dtype)
        p = gl.convert_layout(p_next, p.type.layout)
        if OVERLAP:
            acc = warpgroup_mma_wait(0, deps=(o_later,))
            mbarrier.arrive(v_empty.index(owed), count=1)
        acc = rescaled(acc, rescale)
    return acc, l, m, p, step


@gluon.jit
def _consume(
    W: gl.constexpr, shared,
    GROUP: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_K: gl.constexpr, HEAD_DIM: gl.constexpr, BUFFERS: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, BETWEEN: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: rows 64 W to 64 W + 63 of every tile."""
    tensors, meaning, sizes, memory, rings, schedule = shared
    _, _, _, o_desc, lse_ptr = tensors
    first_ptr, last_ptr, slopes_ptr, scale, behind, ahead, cap = meaning
    n_head, seq_q, seq_k, _, _, _, _ = sizes
    q_s, o_s, k_s, v_s = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    ROWS: gl.constexpr = WARPGROUPS * 64
    FROM: gl.constexpr = behind is not None or first_ptr is not None
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_K, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    dtype: gl.constexpr = k_s.dtype
    qk_scale = scale * LOG2E
    # The keys of the last block that this warpgroup sees. HALF: causality lets the first of two see the first half.
    NEAR: gl.constexpr = 64 if HALF and W == 0 else BLOCK_K
    near_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, NEAR, 16])
    near_zero = gl.zeros([64, NEAR], gl.float32, near_layout)
    if W == WARPGROUPS - 1:
        _pass_tensor_cores(W, WARPGROUPS)  # warpgroup 0 may start
    step = 0
    n = 0
    q_tile, batch, head = take(schedule, n)
    while q_tile >= 0:
        row = q_tile * ROWS + 64 * W
        slope = None
        if slopes_ptr is not None:
            slope = gl.load(slopes_ptr + head) / scale
        tile_lowest, tile_highest, all_from, all_to = _blocks(
            q_tile * ROWS, ROWS, BLOCK_K, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr
        )
        lowest, highest, whole_from, whole_to = _blocks(row, 64, BLOCK_K, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr)
        if first_ptr is not None:
            # document_ids that are not sorted give wrong results; they must not give a barrier that waits for ever.
            lowest = gl.minimum(gl.maximum(lowest, tile_lowest), tile_highest)
            highest = gl.maximum(gl.minimum(highest, tile_highest), lowest)
        index = row + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
        first, last = interval(index, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr)
        rows = index + (seq_k - seq_q)

        step = _hand_on(tile_highest - highest, step, rings, W, WARPGROUPS, BUFFERS)
        mbarrier.wait(q_full.index(W), n & 1)
        q = q_s.index(W).reshape([64, HEAD_DIM])
        if Q_IN_REGISTERS:
            q = q.load(gl.DotOperandLayout(operand_index=0, parent=s_layout, k_width=2))
            mbarrier.arrive(q_empty.index(W), count=1)
        # The last block first, always masked; then down to the first.
        slot = step % BUFFERS
        mbarrier.wait(k_full.index(slot), (step // BUFFERS) & 1)
        _take_tensor_cores(W)
        near = k_s.index(slot).reshape([BLOCK_K, HEAD_DIM]).slice(0, NEAR)
        s = warpgroup_mma(q, near.permute((1, 0)), near_zero, use_acc=False, is_async=True)
        _pass_tensor_cores(W, WARPGROUPS)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        cols = highest * BLOCK_K + gl.arange(0, NEAR, layout=gl.SliceLayout(0, near_layout))
        near_rows, near_first, near_last = _rows_of(near_layout, rows, first, last)
        s = _mask(_bend(s, near_rows, cols, cap, slope), cols, near_first, near_last, FROM)
        p, m, l = softmax_of_first(s, qk_scale, dtype)
        if NEAR < BLOCK_K:
            p = beside_nothing(p)
        acc = gl.zeros([64, HEAD_DIM], gl.float32, o_layout)
        block = highest - 1
        if BETWEEN:  # further blocks that the diagonal or a document's end cuts
            steps = gl.maximum(gl.minimum(block - whole_to, block - lowest + 1), 0)
            acc, l, m, p, step = _steps(
                acc, l, m, p, block, steps, step, q, memory, rings, rows, first, last, qk_scale, cap, slope,
                W, WARPGROUPS, BLOCK_K, HEAD_DIM, BUFFERS, True, FROM, s_layout, o_layout,
            )  # fmt: skip
            block -= steps
        steps = block - lowest + 1
        if FROM:
            steps = gl.maximum(gl.minimum(steps, block - whole_from + 1), 0)
        acc, l, m, p, step = _steps(
            acc, l, m, p, block, steps, step, q, memory, rings, rows, first, last, qk_scale, cap, slope,
            W, WARPGROUPS, BLOCK_K, HEAD_DIM, BUFFERS, False, FROM, s_layout, o_layout,
        )  # fmt: skip
        if FROM:  # blocks that the window or a document's start cuts
            block -= steps
            acc, l, m, p, step = _steps(
                acc, l, m, p, block, block - lowest + 1, step, q, memory, rings, rows, first, last, qk_scale, cap, slope,
                W, WARPGROUPS, BLOCK_K, HEAD_DIM, BUFFERS, True, FROM, s_layout, o_layout,
            )  # fmt: skip
        if not Q_IN_REGISTERS and HEAD_DIM < 256:
            mbarrier.arrive(q_empty.index(W), count=1)  # the last read of Q is done
        slot = step % BUFFERS
        mbarrier.wait(v_full.index(slot), (step // BUFFERS) & 1)
        acc = warpgroup_mma(as_operand(p, dtype, p_layout), v_s.index(slot).reshape([BLOCK_K, HEAD_DIM]), acc, is_async=True)
        sums = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, s_layout))
        m_of_rows = gl.convert_layout(gl.max(m, 1), gl.SliceLayout(1, s_layout))
        blind = sums == 0.0
        lse = gl.where(blind, float("-inf"), (m_of_rows * qk_scale + gl.log2(sums)) * LN2)
        gl.store(lse_ptr + (batch.to(gl.int64) * n_head + head) * seq_q + index, lse, mask=index < seq_q)
        share = gl.where(blind, 0.0, 1.0 / sums)
        tma.store_wait(0)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(slot), count=1)
        step += 1
        if FROM:
            step = _hand_on(lowest - tile_lowest, step, rings, W, WARPGROUPS, BUFFERS)
        o = o_s.index(W)
        out = (acc * gl.convert_layout(share, gl.SliceLayout(1, o_layout))[:, None]).to(o.dtype)
        if o.shape[3] == HEAD_DIM:
            o.reshape([64, HEAD_DIM]).store(out)
            fence_async_shared()
            tma_store(o_desc, [batch, head, row, 0], o)
        else:
            _store_in_halves(o_desc, batch, head, row, out, o)
        if HEAD_DIM == 256:
            tma.store_wait(0)  # O lies in Q's place
            mbarrier.arrive(q_empty.index(W), count=1)
        n += 1
        q_tile, batch, head = take(schedule, n)
    if W == 0:
        _take_tensor_cores(W)  # what the last warpgroup has passed on
    tma.store_wait(0)


@gluon.jit
def _store_in_halves(o_desc, batch, head, row, out, o):
    """The output of 64 rows, [64, head_dim], through shared memory for half of the columns."""
    WIDTH: gl.constexpr = o.shape[3]
    halves = gl.split(out.reshape([64, 2, WIDTH]).permute((0, 2, 1)))
    for i in gl.static_range(2):
        tma.store_wait(0)
        o.reshape([64, WIDTH]).store(halves[i])
        fence_async_shared()
        tma_store(o_desc, [batch, head, row, WIDTH * i], o)


SIZES = ["behind", "ahead", "n_head", "seq_q", "seq_k", "n_tile", "n_tiles", "heads_at_once", "batch_heads"]


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["lse_ptr", "first_ptr", "last_ptr", "slopes_ptr", "counter"])
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, first_ptr, last_ptr, slopes_ptr, counter, scale, behind, ahead, cap,
    n_head, seq_q, seq_k, n_tile, n_tiles, heads_at_once, batch_heads,
    GROUP: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_K: gl.constexpr, HEAD_DIM: gl.constexpr, BUFFERS: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, BETWEEN: gl.constexpr, HALF: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Allocates shared memory and barriers, and sends each warpgroup to its work.

    BETWEEN: beside the last block that a tile sees, others may be cut at their end. HALF: of the last, the first of two warpgroups
    sees the first half.
    """
    q_s = gl.allocate_shared_memory(q_desc.dtype, [WARPGROUPS, 1, 1, 64, HEAD_DIM], q_desc.layout)
    if HEAD_DIM < 256:
        o_s = gl.allocate_shared_memory(o_desc.dtype, [WARPGROUPS, 1, 1, 64, HEAD_DIM], o_desc.layout)
    else:  # there is no room for both, nor for all columns in float32
        o_s = seen_as(q_s, o_desc.dtype, [WARPGROUPS, 1, 1, 64, o_desc.block_type.shape[3]], o_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [BUFFERS, 1, 1, BLOCK_K, HEAD_DIM], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [BUFFERS, 1, 1, BLOCK_K, HEAD_DIM], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    drawn = gl.allocate_shared_memory(gl.int32, [6, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    published = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(published.index(i), count=1)
        mbarrier.init(taken.index(i), count=WARPGROUPS)
    for i in gl.static_range(WARPGROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=WARPGROUPS)
        mbarrier.init(v_empty.index(i), count=WARPGROUPS)
    fence_async_shared()
    shared = (
        (q_desc, k_desc, v_desc, o_desc, lse_ptr),
        (first_ptr, last_ptr, slopes_ptr, scale, behind, ahead, cap),
        (n_head, seq_q, seq_k, n_tile, n_tiles, heads_at_once, batch_heads),
        (q_s, o_s, k_s, v_s),
        (q_full, q_empty, k_full, k_empty, v_full, v_empty),
        (drawn, published, taken, counter),
    )
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), shared, GROUP, WARPGROUPS, BLOCK_K, HEAD_DIM, BUFFERS, Q_IN_REGISTERS, BETWEEN, HALF)),
                (_consume, (gl.constexpr(1), shared, GROUP, WARPGROUPS, BLOCK_K, HEAD_DIM, BUFFERS, Q_IN_REGISTERS, BETWEEN, HALF)),
                (_produce, (shared, GROUP, WARPGROUPS, BLOCK_K, HEAD_DIM, BUFFERS)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), shared, GROUP, WARPGROUPS, BLOCK_K, HEAD_DIM, BUFFERS, Q_IN_REGISTERS, BETWEEN, HALF)),
                (_consume, (gl.constexpr(1), shared, GROUP, WARPGROUPS, BLOCK_K, HEAD_DIM, BUFFERS, Q_IN_REGISTERS, BETWEEN, HALF)),
                (_consume, (gl.constexpr(2), shared, GROUP, WARPGROUPS, BLOCK_K, HEAD_DIM, BUFFERS, Q_IN_REGISTERS, BETWEEN, HALF)),
                (_produce, (shared, GROUP, WARPGROUPS, BLOCK_K, HEAD_DIM, BUFFERS)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
