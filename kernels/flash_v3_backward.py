"""flash_v3's backward: one kernel, five matrix products, dQ added up in float32 by TMA.

Shah et al. (2024), section 3.1 and appendix B.1. A block works on 128 keys of one key/value head at a time and walks the tiles of
64 queries that see any of them, for every query head of the group. Inside it:

    producer    one warp: TMA brings K and V once, then Q with its row statistics, and dO, tile by tile into rings of shared
                memory.
    consumers   two warpgroups, 64 keys each. S and dP are computed transposed, keys by queries, so that P and dS enter dV and dK
                from registers. dS also goes to shared memory, where each warpgroup computes half of the columns of dQ over all
                128 keys and adds it to memory by TMA. dK and dV stay in registers to the end.

Where registers allow it, a tile's scores are computed early (EARLY: under the writing of the dQ before) and its dQ late (LATE: in
the step after it, when the other warpgroup has surely stored its dS).

Letters as in flash_v2; a step is one tile of queries of one head, counted through all of a block's work.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from kernels.hopper_ops import (
    barrier,
    draw,
    interval,
    locate,
    seen_as,
    take,
    tanh_of_ratio,
    tma_add,
    tma_load,
    tma_store,
    with_distance,
)
from kernels.tile_ops import LOG2E

QUERIES = gl.constexpr(64)  # of a tile
KEYS = gl.constexpr(128)  # of a block, 64 to a warpgroup
NEVER = gl.constexpr(2**30)  # a tile that does not come


@gluon.jit
def _tiles(key, ROWS: gl.constexpr, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr):
    """First and last tile of queries that see any of ROWS keys, and the first and last that see all of them."""
    start, all_to = interval(key, batch, seq_k, seq_q, ahead, behind, first_ptr, last_ptr)
    all_from, end = interval(key + ROWS - 1, batch, seq_k, seq_q, ahead, behind, first_ptr, last_ptr)
    whole_from = gl.cdiv(all_from, QUERIES)
    whole_to = gl.maximum(all_to + 1, 0) // QUERIES - 1
    if all_to == seq_q - 1:  # a ragged last tile: its queries beyond the end have no probability anyway
        whole_to = gl.maximum(whole_to, (seq_q - 1) // QUERIES)
    if key + ROWS > seq_k:  # keys beyond the end must be masked everywhere
        whole_from = NEVER
    return start // QUERIES, gl.maximum(end, -1) // QUERIES + gl.where(end < 0, -1, 0), whole_from, whole_to


@gluon.jit
def _produce(shared, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BUFFERS: gl.constexpr):
    tensors, meaning, sizes, memory, rings, schedule = shared
    q_desc, do_desc, k_desc, v_desc, half_desc, stats_desc, _, _, _ = tensors
    first_ptr, last_ptr, _, _, behind, ahead, _ = meaning
    n_kv_head, seq_q, seq_k, n_tile, n_tiles, heads_at_once, batch_heads = sizes
    q_s, do_s, k_s, v_s, half_s, stats_s, _, _ = memory
    kv_full, kv_empty, q_full, q_empty, do_full, do_empty = rings
    V_BYTES: gl.constexpr = 2 * v_desc.block_type.nbytes + (4 * half_desc.block_type.nbytes if HEAD_DIM == 64 else 0)
    step = 0
    n = 0
    tile = draw(schedule, n)
    while tile < n_tiles:
        place, batch, kv_head = locate(tile, n_tile, n_kv_head, heads_at_once, batch_heads)
        key = place * KEYS
        lowest, highest, whole_from, whole_to = _tiles(key, KEYS, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr)
        mbarrier.wait(kv_empty.index(0), (n & 1) ^ 1)
        mbarrier.expect(kv_full.index(0), 2 * k_desc.block_type.nbytes)
        for w in gl.static_range(2):
            tma_load(k_desc, [batch, kv_head, key + 64 * w, 0], kv_full.index(0), k_s.index(w))
        mbarrier.expect(kv_full.index(1), V_BYTES)
        for w in gl.static_range(2):
            tma_load(v_desc, [batch, kv_head, key + 64 * w, 0], kv_full.index(1), v_s.index(w))
            if HEAD_DIM == 64:
                for half in gl.static_range(2):
                    tma_load(half_desc, [batch, kv_head, key + 64 * w, 32 * half], kv_full.index(1), half_s.index(2 * w + half))
        for member in range(GROUP):
            head = kv_head * GROUP + member
            stats_row = (batch * n_kv_head * GROUP + head) * gl.cdiv(seq_q, QUERIES)
            for q_tile in range(lowest, highest + 1):
                slot = step % BUFFERS
                phase = (step // BUFFERS) & 1
                mbarrier.wait(q_empty.index(slot), phase ^ 1)
                mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes + stats_desc.block_type.nbytes)
                tma_load(q_desc, [batch, head, q_tile * QUERIES, 0], q_full.index(slot), q_s.index(slot))
                tma_load(stats_desc, [stats_row + q_tile, 0], q_full.index(slot), stats_s.index(slot))
                mbarrier.wait(do_empty.index(slot), phase ^ 1)
                mbarrier.expect(do_full.index(slot), do_desc.block_type.nbytes)
                tma_load(do_desc, [batch, head, q_tile * QUERIES, 0], do_full.index(slot), do_s.index(slot))
                step += 1
        n += 1
        tile = draw(schedule, n)


# ---- dQ, to which both warpgroups bring their keys ----


@gluon.jit
def _hand_over_ds(W: gl.constexpr, ds, step, memory):
    """Stores this warpgroup's dS, in the buffer of the step's parity, and tells the other one.

    The barriers' numbers alternate with the step: with one number a warpgroup could arrive twice before the other has waited.
    """
    _, _, _, _, _, _, ds_s, _ = memory
    turn = step % 2
    ds_s.index(turn * 2 + W).store(ds)
    fence_async_shared()
    barrier("arrive", 6 + turn * 2 + W)


@gluon.jit
def _await_ds(W: gl.constexpr, step):
    """Waits for the other warpgroup's dS."""
    barrier("sync", 7 - W + step % 2 * 2)


@gluon.jit
def _half_of_dq(W: gl.constexpr, step, nought, memory, zero, HEAD_DIM: gl.constexpr):
    """This warpgroup's half of the columns of dQ = dS^T K, over both warpgroups' keys: two groups of products."""
    _, _, k_s, _, half_s, _, ds_s, _ = memory
    if HEAD_DIM == 128:
        k0 = k_s.index(nought).reshape([64, HEAD_DIM]).slice(64 * W, 64, dim=1)
        k1 = k_s.index(1 + nought).reshape([64, HEAD_DIM]).slice(64 * W, 64, dim=1)
    else:
        k0 = half_s.index(W + nought).reshape([64, 32])
        k1 = half_s.index(2 + W + nought).reshape([64, 32])
    turn = step % 2
    dq = warpgroup_mma(ds_s.index(turn * 2).permute((1, 0)), k0, zero, use_acc=False, is_async=True)
    return warpgroup_mma(ds_s.index(turn * 2 + 1).permute((1, 0)), k1, dq, is_async=True)


@gluon.jit
def _add_dq(W: gl.constexpr, dq, head_tiles, tile, memory, dq_desc, HEAD_DIM: gl.constexpr):
    """Adds this warpgroup's columns of a tile's dQ to the sum in memory, in the order in which its threads hold them.

    16 bytes of each thread lie side by side, so that shared memory is written without bank conflicts; flash_v3_ends puts them in
    their places.
    """
    _, _, _, _, _, _, _, dq_s = memory
    tma.store_wait(0)
    held = dq.reshape([4, 2, 8, HEAD_DIM // 16, 4, 2]).permute([3, 0, 2, 4, 1, 5])
    dq_s.index(W).store(held.reshape([HEAD_DIM, 32]))
    fence_async_shared()
    tma_add(dq_desc, [((head_tiles + tile) * 2 + W) * HEAD_DIM, 0], dq_s.index(W))


@gluon.jit
def _dq(W: gl.constexpr, tile, step, head_tiles, memory, dq_desc, seq_q, zero, HEAD_DIM: gl.constexpr):
    """A whole dQ, with nothing under it."""
    _await_ds(W, step)
    dq = _half_of_dq(W, step, (seq_q - tile) >> 31, memory, zero, HEAD_DIM)
    dq = warpgroup_mma_wait(0, deps=(dq,))
    _add_dq(W, dq, head_tiles, tile, memory, dq_desc, HEAD_DIM)


# ---- the tiles that a warpgroup's keys are seen from, and those that they are not ----


@gluon.jit
def _unseen(
    start, stop, all_lowest, offset, head_tiles, memory, rings, dq_desc, seq_q, zero_dq,
    W: gl.constexpr, HEAD_DIM: gl.constexpr, BUFFERS: gl.constexpr, LATE: gl.constexpr, s_layout: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Tiles that see the other warpgroup's keys and none of this one's: dS is zero."""
    _, _, q_full, q_empty, do_full, do_empty = rings
    for tile in range(start, stop):
        step = offset + tile
        slot = step % BUFFERS
        phase = (step // BUFFERS) & 1
        mbarrier.wait(q_full.index(slot), phase)
        mbarrier.wait(do_full.index(slot), phase)
        mbarrier.arrive(q_empty.index(slot), count=1)
        mbarrier.arrive(do_empty.index(slot), count=1)
        if LATE and tile > all_lowest:
            _dq(W, tile - 1, step - 1, head_tiles, memory, dq_desc, seq_q, zero_dq, HEAD_DIM)
        _hand_over_ds(W, gl.zeros([64, QUERIES], dtype, s_layout), step, memory)
        if not LATE:
            _dq(W, tile, step, head_tiles, memory, dq_desc, seq_q, zero_dq, HEAD_DIM)


@gluon.jit
def _seen(
    s, dk, dv, start, stop, highest, all_lowest, offset, head_tiles, k, v, first, last, keys, memory, rings, dq_desc,
    qk_scale, cap, slope, seq_q, zero_s, zero_dq,
    W: gl.constexpr, HEAD_DIM: gl.constexpr, BUFFERS: gl.constexpr, IN_REGISTERS: gl.constexpr, EARLY: gl.constexpr,
    LATE: gl.constexpr, MASKED: gl.constexpr, s_layout: gl.constexpr, kv_layout: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    q_s, do_s, k_s, v_s, _, stats_s, _, _ = memory
    _, _, q_full, q_empty, do_full, do_empty = rings
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=kv_layout, k_width=2)
    for tile in range(start, stop):
        step = offset + tile
        slot = step % BUFFERS
        phase = (step // BUFFERS) & 1
        # Always zero, which the compiler cannot know: it would keep addresses of K and V in 24 registers over the loop, and spill.
        nought = (seq_q - tile) >> 31
        q = q_s.index(slot).reshape([QUERIES, HEAD_DIM])
        do = do_s.index(slot).reshape([QUERIES, HEAD_DIM])
        if IN_REGISTERS:
            k_now = k
            v_now = v
        else:
            k_now = k_s.index(W + nought).reshape([64, HEAD_DIM])
            v_now = v_s.index(W + nought).reshape([64, HEAD_DIM])
        if not EARLY:
            mbarrier.wait(q_full.index(slot), phase)
            s_later = warpgroup_mma(k_now, q.permute((1, 0)), zero_s, use_acc=False, is_async=True)
        mbarrier.wait(do_full.index(slot), phase)
        dp_later = warpgroup_mma(v_now, do.permute((1, 0)), zero_s, use_acc=False, is_async=True)
        if LATE:  # the tile before; before the first one a product that nobody reads. step + 1 has step - 1's parity, and no sign
            if tile > all_lowest:
                _await_ds(W, step - 1)
            dq_later = _half_of_dq(W, step + 1, nought, memory, zero_dq, HEAD_DIM)
        lse = stats_s.index(slot).slice(0, QUERIES, dim=1).load(s_layout)
        if not EARLY:
            s = warpgroup_mma_wait(3 if LATE else 1, deps=(s_later,))
        queries = tile * QUERIES + gl.arange(0, QUERIES, layout=gl.SliceLayout(0, s_layout))
        if cap is not None:
            bent = tanh_of_ratio(s, cap)
            s = cap * bent
        if slope is not None:
            s = with_distance(s, slope, keys, queries)
        p = gl.exp2(s * qk_scale - lse)
        if MASKED:
            p = gl.where((queries[None, :] >= first[:, None]) & (queries[None, :] <= last[:, None]), p, 0.0)
        dv_later = warpgroup_mma(gl.convert_layout(p.to(dtype), operand), do, dv, is_async=True)
        delta = stats_s.index(slot).slice(QUERIES, QUERIES, dim=1).load(s_layout)
        dp = warpgroup_mma_wait(3 if LATE else 1, deps=(dp_later,))
        ds = p * (dp - delta)
        if cap is not None:
            ds = ds * (1.0 - bent * bent)
        ds = ds.to(dtype)
        if LATE:
            dq = warpgroup_mma_wait(1, deps=(dq_later,))
            if tile > all_lowest:
                _add_dq(W, dq, head_tiles, tile - 1, memory, dq_desc, HEAD_DIM)
        _hand_over_ds(W, ds, step, memory)
        dk_later = warpgroup_mma(gl.convert_layout(ds, operand), q, dk, is_async=True)
        if not LATE:
            _await_ds(W, step)
            dq_later = _half_of_dq(W, step, nought, memory, zero_dq, HEAD_DIM)
        if EARLY:  # the next tile's scores; after the last tile a product that nobody reads
            next_slot = (step + 1) % BUFFERS
            mbarrier.wait(q_full.index(next_slot), ((step + 1) // BUFFERS) & 1, pred=tile < highest)
            q_next = q_s.index(next_slot).reshape([QUERIES, HEAD_DIM])
            s_later = warpgroup_mma(k_now, q_next.permute((1, 0)), zero_s, use_acc=False, is_async=True)
        dv = warpgroup_mma_wait((1 if LATE else 3) + (1 if EARLY else 0), deps=(dv_later,))
        mbarrier.arrive(do_empty.index(slot), count=1)
        if LATE:
            dk = warpgroup_mma_wait(1 if EARLY else 0, deps=(dk_later,))
        else:
            dk, dq = warpgroup_mma_wait(1 if EARLY else 0, deps=(dk_later, dq_later))
        mbarrier.arrive(q_empty.index(slot), count=1)
        if not LATE:
            _add_dq(W, dq, head_tiles, tile, memory, dq_desc, HEAD_DIM)
        if EARLY:
            s = warpgroup_mma_wait(0, deps=(s_later,))
    return s, dk, dv


@gluon.jit
def _consume(
    W: gl.constexpr, shared,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BUFFERS: gl.constexpr, IN_REGISTERS: gl.constexpr, EARLY: gl.constexpr,
    LATE: gl.constexpr, FROM: gl.constexpr, TO: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: keys 64 W to 64 W + 63 of each block."""
    tensors, meaning, sizes, memory, rings, schedule = shared
    _, _, _, _, _, _, dq_desc, dk_desc, dv_desc = tensors
    first_ptr, last_ptr, slopes_ptr, scale, behind, ahead, cap = meaning
    n_kv_head, seq_q, seq_k, n_tile, n_tiles, heads_at_once, batch_heads = sizes
    q_s, _, k_s, v_s, _, _, _, dq_s = memory
    kv_full, kv_empty, q_full, _, _, _ = rings
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, QUERIES, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM // 2, 16])
    dtype: gl.constexpr = k_s.dtype
    zero_s = gl.zeros([64, QUERIES], gl.float32, s_layout)
    zero_dq = gl.zeros([64, HEAD_DIM // 2], gl.float32, dq_layout)
    qk_scale = scale * LOG2E
    done = 0
    n = 0
    tile = take(schedule, n)
    while tile < n_tiles:
        place, batch, kv_head = locate(tile, n_tile, n_kv_head, heads_at_once, batch_heads)
        key = place * KEYS + 64 * W
        all_lowest, all_highest, all_from, all_to = _tiles(
            place * KEYS, KEYS, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr
        )
        lowest, highest, whole_from, whole_to = _tiles(key, 64, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr)
        if first_ptr is not None:
            # document_ids that are not sorted give wrong results; they must not give a barrier that waits for ever.
            all_highest = gl.maximum(all_highest, all_lowest - 1)
            lowest = gl.maximum(lowest, all_lowest)
        lowest = gl.minimum(lowest, all_highest + 1)
        highest = gl.maximum(gl.minimum(highest, all_highest), lowest - 1)
        cut = gl.minimum(gl.maximum(whole_from, lowest), highest + 1)
        end = highest + 1
        if TO:
            end = gl.maximum(gl.minimum(whole_to, highest) + 1, cut)
        index = key + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
        first, last = interval(index, batch, seq_k, seq_q, ahead, behind, first_ptr, last_ptr)
        last = gl.where(index < seq_k, last, -1)
        keys = index + (seq_q - seq_k)

        dk = gl.zeros([64, HEAD_DIM], gl.float32, kv_layout)
        dv = gl.zeros([64, HEAD_DIM], gl.float32, kv_layout)
        mbarrier.wait(kv_full.index(0), n & 1)
        mbarrier.wait(kv_full.index(1), n & 1)
        k = k_s.index(W).reshape([64, HEAD_DIM])
        v = v_s.index(W).reshape([64, HEAD_DIM])
        if IN_REGISTERS:
            whole: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=s_layout, k_width=2)
            k = k.load(whole)
            v = v.load(whole)
        for member in range(GROUP):
            head_tiles = ((batch * n_kv_head + kv_head) * GROUP + member) * gl.cdiv(seq_q, QUERIES)
            offset = done - all_lowest
            slope = None
            if slopes_ptr is not None:
                slope = gl.load(slopes_ptr + kv_head * GROUP + member) / scale
            if FROM:
                _unseen(
                    all_lowest, lowest, all_lowest, offset, head_tiles, memory, rings, dq_desc, seq_q, zero_dq,
                    W, HEAD_DIM, BUFFERS, LATE, s_layout, dtype,
                )  # fmt: skip
            s = zero_s
            if EARLY:
                at = offset + lowest
                mbarrier.wait(q_full.index(at % BUFFERS), (at // BUFFERS) & 1, pred=lowest <= highest)
                q = q_s.index(at % BUFFERS).reshape([QUERIES, HEAD_DIM])
                s = warpgroup_mma(k, q.permute((1, 0)), zero_s, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=(s,))
            s, dk, dv = _seen(
                s, dk, dv, lowest, cut, highest, all_lowest, offset, head_tiles, k, v, first, last, keys, memory, rings, dq_desc,
                qk_scale, cap, slope, seq_q, zero_s, zero_dq,
                W, HEAD_DIM, BUFFERS, IN_REGISTERS, EARLY, LATE, True, s_layout, kv_layout, dtype,
            )  # fmt: skip
            s, dk, dv = _seen(
                s, dk, dv, cut, end, highest, all_lowest, offset, head_tiles, k, v, first, last, keys, memory, rings, dq_desc,
                qk_scale, cap, slope, seq_q, zero_s, zero_dq,
                W, HEAD_DIM, BUFFERS, IN_REGISTERS, EARLY, LATE, False, s_layout, kv_layout, dtype,
            )  # fmt: skip
            if TO:
                s, dk, dv = _seen(
                    s, dk, dv, end, highest + 1, highest, all_lowest, offset, head_tiles, k, v, first, last, keys, memory, rings,
                    dq_desc, qk_scale, cap, slope, seq_q, zero_s, zero_dq,
                    W, HEAD_DIM, BUFFERS, IN_REGISTERS, EARLY, LATE, True, s_layout, kv_layout, dtype,
                )  # fmt: skip
                _unseen(
                    highest + 1, all_highest + 1, all_lowest, offset, head_tiles, memory, rings, dq_desc, seq_q, zero_dq,
                    W, HEAD_DIM, BUFFERS, LATE, s_layout, dtype,
                )  # fmt: skip
            if LATE and all_highest >= all_lowest:
                _dq(W, all_highest, offset + all_highest, head_tiles, memory, dq_desc, seq_q, zero_dq, HEAD_DIM)
            done += gl.maximum(all_highest + 1 - all_lowest, 0)
        v_s.index(W).reshape([64, HEAD_DIM]).store(dv.to(dtype))
        fence_async_shared()
        tma_store(dv_desc, [batch, kv_head, key, 0], v_s.index(W))
        tma.store_wait(1)  # the last tile of dQ has been read: its buffer takes dK
        dk_s = seen_as(dq_s.index(W), dtype, HEAD_DIM, dk_desc.layout)
        dk_s.reshape([64, HEAD_DIM]).store((dk * scale).to(dtype))
        fence_async_shared()
        tma_store(dk_desc, [batch, kv_head, key, 0], dk_s)
        tma.store_wait(1)  # dV has been read: K and V may be overwritten
        mbarrier.arrive(kv_empty.index(0), count=1)
        n += 1
        tile = take(schedule, n)
    tma.store_wait(0)


SIZES = ["behind", "ahead", "n_kv_head", "seq_q", "seq_k", "n_tile", "n_tiles", "heads_at_once", "batch_heads"]


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["first_ptr", "last_ptr", "slopes_ptr", "counter"])
def backward_kernel(
    q_desc, do_desc, k_desc, v_desc, half_desc, stats_desc, dq_desc, dk_desc, dv_desc, first_ptr, last_ptr, slopes_ptr, counter,
    scale, behind, ahead, cap, n_kv_head, seq_q, seq_k, n_tile, n_tiles, heads_at_once, batch_heads,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BUFFERS: gl.constexpr, IN_REGISTERS: gl.constexpr, EARLY: gl.constexpr,
    LATE: gl.constexpr, FROM: gl.constexpr, TO: gl.constexpr,
):  # fmt: skip
    """Allocates shared memory and barriers, and sends each warpgroup to its work.

    FROM, TO: which ends of the interval of queries that see a key may cut a tile.
    """
    q_s = gl.allocate_shared_memory(q_desc.dtype, [BUFFERS, 1, 1, QUERIES, HEAD_DIM], q_desc.layout)
    do_s = gl.allocate_shared_memory(q_desc.dtype, [BUFFERS, 1, 1, QUERIES, HEAD_DIM], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [2, 1, 1, 64, HEAD_DIM], k_desc.layout)
    v_s = gl.allocate_shared_memory(k_desc.dtype, [2, 1, 1, 64, HEAD_DIM], k_desc.layout)
    half_s = k_s
    if HEAD_DIM == 64:  # K once more, in halves of 32 columns: a swizzled buffer of 64 cannot be cut
        half_s = gl.allocate_shared_memory(k_desc.dtype, [4, 1, 1, 64, 32], half_desc.layout)
    stats_s = gl.allocate_shared_memory(gl.float32, [BUFFERS, 1, 2 * QUERIES], stats_desc.layout)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, QUERIES], q_desc.dtype)
    ds_s = gl.allocate_shared_memory(q_desc.dtype, [4, 64, QUERIES], ds_layout)
    dq_s = gl.allocate_shared_memory(gl.float32, [2, HEAD_DIM, 32], dq_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    drawn = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    published = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_empty.index(0), count=2)
    for i in gl.static_range(2):
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(published.index(i), count=1)
        mbarrier.init(taken.index(i), count=2)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(do_empty.index(i), count=2)
    fence_async_shared()
    shared = (
        (q_desc, do_desc, k_desc, v_desc, half_desc, stats_desc, dq_desc, dk_desc, dv_desc),
        (first_ptr, last_ptr, slopes_ptr, scale, behind, ahead, cap),
        (n_kv_head, seq_q, seq_k, n_tile, n_tiles, heads_at_once, batch_heads),
        (q_s, do_s, k_s, v_s, half_s, stats_s, ds_s, dq_s),
        (kv_full, kv_empty, q_full, q_empty, do_full, do_empty),
        (drawn, published, taken, counter),
    )
    gl.warp_specialize(
        [
            (_consume, (gl.constexpr(0), shared, GROUP, HEAD_DIM, BUFFERS, IN_REGISTERS, EARLY, LATE, FROM, TO)),
            (_consume, (gl.constexpr(1), shared, GROUP, HEAD_DIM, BUFFERS, IN_REGISTERS, EARLY, LATE, FROM, TO)),
            (_produce, (shared, GROUP, HEAD_DIM, BUFFERS)),
        ],
        [4, 1],
        [240, 24],
    )
