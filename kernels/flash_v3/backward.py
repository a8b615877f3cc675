"""flash_v3's backward: one kernel, five matrix products, dQ added up in float32 by TMA.

Shah et al. (2024), section 3.1 and appendix B.1, with dQ in a warpgroup of its own. One block per multiprocessor stays for the
whole launch. It draws 128 keys of one key/value head at a time (64 at head_dim 256) and walks the tiles of 64 queries that see
any of them, for every query head of the group. Inside it:

    producer    one warp: TMA brings K and V once, then Q with its row statistics, and dO, tile by tile into rings of shared
                memory. Where there is room for two blocks of K and V, the next comes while one is at work.
    consumers   two warpgroups, 64 keys each. S and dP are computed transposed, keys by queries, so that P and dS enter dV and dK
                from registers, where dK and dV stay to the end. dS also goes to shared memory, and the warpgroup goes on.
                Not so at head_dim 256, where registers hold half the columns of dK and dV: a block has 64 keys, and both
                compute all of its S and dP.
    dQ          one warpgroup (flash_v3_dq.py): takes dS, multiplies it with K, and has TMA add the product to memory. The
                consumers do not wait for each other from tile to tile, so that one's exponentials run under the other's products.

The order in which blocks add to a tile of dQ is that of their arrival or, asked for DETERMINISTIC gradients, from the last keys to
the first: where causality or a window cuts, the block with later keys comes to a tile of queries earlier.

Letters as in flash_v2; a step is one tile of queries of one head, counted through all of a block's work.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ..tile_ops import LOG2E
from .backward_dq import sum_dq
from .hopper_ops import (
    draw,
    interval,
    take,
    tanh_of_ratio,
    tma_load,
    tma_store,
    with_distance,
)
from .protocol import (
    QUERIES,
    await_ds_read,
    await_other_consumer,
    await_release,
    hand_over_ds,
    keys_of,
    kv_slot,
    release,
    tiles_of,
    width_of,
)

# Registers of a thread: of the second consumer, of dQ's warpgroup (the assembler refuses to go lower), of the producer. The first
# consumer gets the rest of the 512 that four warpgroups share, 208.
CONSUMER_REGISTERS = gl.constexpr(216)
DQ_REGISTERS = gl.constexpr(64)
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def _produce(shared, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, DETERMINISTIC: gl.constexpr):
    tensors, meaning, sizes, memory, rings, schedule = shared
    q_desc, do_desc, k_desc, v_desc, stats_desc, _, _, _ = tensors
    first_ptr, last_ptr, _, _, behind, ahead, _ = meaning
    n_kv_head, seq_q, seq_k, _, _, _, _ = sizes
    q_s, do_s, k_s, v_s, stats_s, _, _ = memory
    kv_full, kv_empty, q_full, do_full = rings
    PARTS: gl.constexpr = HEAD_DIM // width_of(HEAD_DIM)  # of a tile of Q or dO, by columns
    BLOCK: gl.constexpr = keys_of(HEAD_DIM)
    step = 0
    n = 0
    place, batch, kv_head = draw(schedule, n, sizes, DETERMINISTIC, DETERMINISTIC)
    while place >= 0:
        key = place * BLOCK
        lowest, highest, whole_from, whole_to = tiles_of(key, BLOCK, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr)
        kv, phase = kv_slot(n, kv_empty.shape[0])
        mbarrier.wait(kv_empty.index(kv), phase ^ 1)
        _bring_block(k_desc, batch, kv_head, key, kv_full.index(2 * kv), k_s, kv, PARTS)
        _bring_block(v_desc, batch, kv_head, key, kv_full.index(2 * kv + 1), v_s, kv, PARTS)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            stats_row = (batch * n_kv_head * GROUP + head) * gl.cdiv(seq_q, QUERIES)
            for q_tile in range(lowest, highest + 1):
                slot = step % 2
                await_release(slot)
                mbarrier.expect(q_full.index(slot), PARTS * q_desc.block_type.nbytes + stats_desc.block_type.nbytes)
                _bring_tile(q_desc, batch, head, q_tile, q_full.index(slot), q_s, slot, PARTS)
                tma_load(stats_desc, [stats_row + q_tile, 0], q_full.index(slot), stats_s.index(slot))
                mbarrier.expect(do_full.index(slot), PARTS * do_desc.block_type.nbytes)
                _bring_tile(do_desc, batch, head, q_tile, do_full.index(slot), do_s, slot, PARTS)
                step += 1
        n += 1
        place, batch, kv_head = draw(schedule, n, sizes, DETERMINISTIC, DETERMINISTIC)
    for slot in gl.static_range(2):  # what the consumers have released last
        await_release(slot)


@gluon.jit
def _bring_block(desc, batch, head, key, full, buffers, kv, PARTS: gl.constexpr):
    """A block of K or V, in two: 64 keys each or, at head_dim 256, 128 columns."""
    mbarrier.expect(full, 2 * desc.block_type.nbytes)
    for half in gl.static_range(2):
        at = [batch, head, key + 64 * half, 0] if PARTS == 1 else [batch, head, key, 128 * half]
        tma_load(desc, at, full, buffers.index(2 * kv + half))


@gluon.jit
def _bring_tile(desc, batch, head, q_tile, full, buffers, slot, PARTS: gl.constexpr):
    """A tile of Q or dO, whole or in parts of 128 columns."""
    for part in gl.static_range(PARTS):
        tma_load(desc, [batch, head, q_tile * QUERIES, 128 * part], full, buffers.index(slot * PARTS + part))


# ---- the consumers: tiles that their keys are seen from, and those that they are not ----


@gluon.jit
def _unseen(start, stop, offset, memory, rings, W: gl.constexpr, s_layout: gl.constexpr, dtype: gl.constexpr):
    """Tiles that see the other warpgroup's keys and none of this one's: dS is zero."""
    _, _, q_full, do_full = rings
    for tile in range(start, stop):
        slot = (offset + tile) % 2
        phase = ((offset + tile) // 2) & 1
        mbarrier.wait(q_full.index(slot), phase)
        mbarrier.wait(do_full.index(slot), phase)
        release(slot)
        hand_over_ds(W, gl.zeros([64, QUERIES], dtype, s_layout), slot, memory)


@gluon.jit
def _dp_less_delta(v, do, stats, zero, s_layout: gl.constexpr):
    """V dO^T - delta: the product begins with -delta in every row, which so needs no registers of its own.

    As a difference, not copied from -delta in memory: for the copy Triton 3.9's assembler lacks registers at head_dim 128.
    """
    delta = stats.slice(QUERIES, QUERIES, dim=1).load(s_layout)
    return warpgroup_mma(v, do.permute((1, 0)), zero - delta, is_async=True)


@gluon.jit
def _seen(
    dk, dv, start, stop, offset, k, v, index, batch, slope, zero, shared,
    W: gl.constexpr, HEAD_DIM: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The tiles from `start` to before `stop`.

    At head_dim 64 K and V stay in registers. Beyond there is no room for them, dP is issued only when the scores have become P,
    and P is rounded for dV only when dS is made of it: it would need registers of its own beside P. At 256 both warpgroups compute
    all of S and dP, and half of dK's and dV's columns each.
    """
    _, meaning, sizes, memory, rings, _ = shared
    first_ptr, last_ptr, _, scale, behind, ahead, cap = meaning
    _, seq_q, seq_k, _, _, _, _ = sizes
    q_s, do_s, k_s, v_s, stats_s, _, _ = memory
    _, _, q_full, do_full = rings
    s_layout: gl.constexpr = zero.type.layout
    dtype: gl.constexpr = k_s.dtype
    WIDE: gl.constexpr = HEAD_DIM == 256
    WIDTH: gl.constexpr = width_of(HEAD_DIM)
    PARTS: gl.constexpr = HEAD_DIM // WIDTH
    HALF: gl.constexpr = 0 if WIDE else W  # the keys that are this warpgroup's; at 256 the first columns
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dk.type.layout, k_width=2)
    qk_scale = scale * LOG2E
    keys = index + (seq_q - seq_k)
    if MASKED:
        # Anew for each loop that masks, through a zero which the compiler cannot know: it would keep them over the loop between.
        index += (seq_q - start) >> 31
        first, last = interval(index, batch, seq_k, seq_q, ahead, behind, first_ptr, last_ptr)
        last = gl.where(index < seq_k, last, -1)
    for step in range(offset + start, offset + stop):
        slot = step & 1
        phase = (step >> 1) & 1
        # Always zero, which the compiler cannot know: it would keep addresses of K and V in 24 registers over the loop, and spill.
        nought = step >> 31
        q = q_s.index(slot * PARTS).reshape([QUERIES, WIDTH])
        do = do_s.index(slot * PARTS).reshape([QUERIES, WIDTH])
        k_now = k
        v_now = v
        if HEAD_DIM >= 128:
            k_now = k_s.index(HALF + nought).reshape([64, WIDTH])
            v_now = v_s.index(HALF + nought).reshape([64, WIDTH])
        mbarrier.wait(q_full.index(slot), phase)
        s_later = warpgroup_mma(k_now, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        if WIDE:
            k_more = k_s.index(1 + nought).reshape([64, WIDTH])
            q_more = q_s.index(slot * PARTS + 1).reshape([QUERIES, WIDTH])
            s_later = warpgroup_mma(k_more, q_more.permute((1, 0)), s_later, is_async=True)
        lse = stats_s.index(slot).slice(0, QUERIES, dim=1).load(s_layout)
        mbarrier.wait(do_full.index(slot), phase)
        if HEAD_DIM == 64:
            dp_later = _dp_less_delta(v_now, do, stats_s.index(slot), zero, s_layout)
        s = warpgroup_mma_wait(1 if HEAD_DIM == 64 else 0, deps=(s_later,))
        queries = (step - offset) * QUERIES + gl.arange(0, QUERIES, layout=gl.SliceLayout(0, s_layout))
        if cap is not None:
            bent = tanh_of_ratio(s, cap)
            s = cap * bent
        if slope is not None:
            s = with_distance(s, slope, keys, queries)
        p = gl.exp2(s * qk_scale - lse)
        if MASKED:
            p = gl.where((queries[None, :] >= first[:, None]) & (queries[None, :] <= last[:, None]), p, 0.0)
        if HEAD_DIM >= 128:
            dp_later = _dp_less_delta(v_now, do, stats_s.index(slot), zero, s_layout)
        if WIDE:
            v_more = v_s.index(1 + nought).reshape([64, WIDTH])
            do_more = do_s.index(slot * PARTS + 1).reshape([QUERIES, WIDTH])
            dp_later = warpgroup_mma(v_more, do_more.permute((1, 0)), dp_later, is_async=True)
        ds = p * warpgroup_mma_wait(0, deps=(dp_later,))
        if cap is not None:
            ds = ds * (1.0 - bent * bent)
        ds = ds.to(dtype)
        if WIDE and W == 1:  # its columns of dV and dK
            do = do_more
            q = q_more
        dv_later = warpgroup_mma(gl.convert_layout(p.to(dtype), operand), do, dv, is_async=True)
        dk_later = warpgroup_mma(gl.convert_layout(ds, operand), q, dk, is_async=True)
        hand_over_ds(W, ds, slot, memory)
        dv, dk = warpgroup_mma_wait(0, deps=(dv_later, dk_later))
        release(slot)
    return dk, dv


@gluon.jit
def _consume(
    W: gl.constexpr, shared,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, FROM: gl.constexpr, TO: gl.constexpr, DETERMINISTIC: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: keys 64 W to 64 W + 63 of each block or, at head_dim 256, columns 128 W to 128 W + 127."""
    tensors, meaning, sizes, memory, rings, schedule = shared
    _, _, _, _, _, _, dk_desc, dv_desc = tensors
    first_ptr, last_ptr, slopes_ptr, scale, behind, ahead, cap = meaning
    _, seq_q, seq_k, _, _, _, _ = sizes
    _, _, k_s, v_s, _, _, _ = memory
    kv_full, kv_empty, _, _ = rings
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, QUERIES, 16])
    WIDE: gl.constexpr = HEAD_DIM == 256
    WIDTH: gl.constexpr = width_of(HEAD_DIM)
    BLOCK: gl.constexpr = keys_of(HEAD_DIM)
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    dtype: gl.constexpr = k_s.dtype
    zero = gl.zeros([64, QUERIES], gl.float32, s_layout)
    for slot in gl.static_range(2):
        release(slot)
    done = 0
    n = 0
    place, batch, kv_head = take(schedule, n)
    while place >= 0:
        key = place * BLOCK + (0 if WIDE else 64 * W)
        all_lowest, all_highest, all_from, all_to = tiles_of(
            place * BLOCK, BLOCK, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr
        )
        lowest, highest, whole_from, whole_to = tiles_of(key, 64, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr)
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

        dk = gl.zeros([64, WIDTH], gl.float32, kv_layout)
        dv = gl.zeros([64, WIDTH], gl.float32, kv_layout)
        kv, phase = kv_slot(n, kv_empty.shape[0])
        mbarrier.wait(kv_full.index(2 * kv), phase)
        mbarrier.wait(kv_full.index(2 * kv + 1), phase)
        k = k_s.index(2 * kv + W).reshape([64, WIDTH])
        v = v_s.index(2 * kv + W).reshape([64, WIDTH])
        if HEAD_DIM == 64:
            whole: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=s_layout, k_width=2)
            k = k.load(whole)
            v = v.load(whole)
        for member in range(GROUP):
            offset = done - all_lowest
            slope = None
            if slopes_ptr is not None:
                slope = gl.load(slopes_ptr + kv_head * GROUP + member) / scale
            if FROM:
                _unseen(all_lowest, lowest, offset, memory, rings, W, s_layout, dtype)
            dk, dv = _seen(dk, dv, lowest, cut, offset, k, v, index, batch, slope, zero, shared, W, HEAD_DIM, MASKED=True)
            dk, dv = _seen(dk, dv, cut, end, offset, k, v, index, batch, slope, zero, shared, W, HEAD_DIM, MASKED=False)
            if TO:
                stop = highest + 1
                dk, dv = _seen(dk, dv, end, stop, offset, k, v, index, batch, slope, zero, shared, W, HEAD_DIM, MASKED=True)
                _unseen(stop, all_highest + 1, offset, memory, rings, W, s_layout, dtype)
            done += gl.maximum(all_highest + 1 - all_lowest, 0)
        # Both through V's buffer: K may still be at work in dQ. This warpgroup alone reads it or, at head_dim 256, both do.
        if WIDE:
            await_other_consumer(W)
        at = [batch, kv_head, key, 128 * W if WIDE else 0]
        _write(dv_desc, at, dv.to(dtype), v_s.index(2 * kv + W), WIDTH)
        _write(dk_desc, at, (dk * scale).to(dtype), v_s.index(2 * kv + W), WIDTH)
        mbarrier.arrive(kv_empty.index(kv), count=1)
        n += 1
        place, batch, kv_head = take(schedule, n)
    for slot in gl.static_range(2):  # what dQ's warpgroup has released last
        if W == 0 or not WIDE:
            await_ds_read(W, slot)


@gluon.jit
def _write(descriptor, coordinates, rows, buffer, WIDTH: gl.constexpr):
    """Rows to memory, through a buffer that is free again on return."""
    buffer.reshape([64, WIDTH]).store(rows)
    fence_async_shared()
    tma_store(descriptor, coordinates, buffer)
    tma.store_wait(0)


SIZES = ["behind", "ahead", "n_kv_head", "seq_q", "seq_k", "n_tile", "n_tiles", "heads_at_once", "batch_heads"]


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["first_ptr", "last_ptr", "slopes_ptr", "counter"])
def backward_kernel(
    q_desc, do_desc, k_desc, v_desc, stats_desc, dq_desc, dk_desc, dv_desc, first_ptr, last_ptr, slopes_ptr, counter,
    scale, behind, ahead, cap, n_kv_head, seq_q, seq_k, n_tile, n_tiles, heads_at_once, batch_heads,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BUFFERS: gl.constexpr,
    SWIZZLE: gl.constexpr, FROM: gl.constexpr, TO: gl.constexpr, DETERMINISTIC: gl.constexpr,
):  # fmt: skip
    """Allocates shared memory and barriers, and sends each warpgroup to its work.

    `counter` is the next block of keys to draw, and behind it one number for each tile of queries. BUFFERS: blocks of keys and
    values in shared memory. SWIZZLE: of dS there, in bytes. FROM, TO: which ends of the queries' interval that see a key may cut.
    """
    WIDTH: gl.constexpr = width_of(HEAD_DIM)
    PARTS: gl.constexpr = HEAD_DIM // WIDTH
    q_s = gl.allocate_shared_memory(q_desc.dtype, [2 * PARTS, 1, 1, QUERIES, WIDTH], q_desc.layout)
    do_s = gl.allocate_shared_memory(q_desc.dtype, [2 * PARTS, 1, 1, QUERIES, WIDTH], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [2 * BUFFERS, 1, 1, 64, WIDTH], k_desc.layout)
    v_s = gl.allocate_shared_memory(k_desc.dtype, [2 * BUFFERS, 1, 1, 64, WIDTH], k_desc.layout)
    stats_s = gl.allocate_shared_memory(gl.float32, [2, 1, 2 * QUERIES], stats_desc.layout)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=SWIZZLE, element_bitwidth=16, rank=2)
    ds_s = gl.allocate_shared_memory(q_desc.dtype, [4 // PARTS, 64, QUERIES], ds_layout)
    dq_s = gl.allocate_shared_memory(gl.float32, [2 // PARTS, 2 * QUERIES, 32], dq_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [2 * BUFFERS, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    drawn = gl.allocate_shared_memory(gl.int32, [6, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    published = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(kv_empty.index(i), count=3)
        mbarrier.init(kv_full.index(2 * i), count=1)
        mbarrier.init(kv_full.index(2 * i + 1), count=1)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(published.index(i), count=1)
        mbarrier.init(taken.index(i), count=3)
    fence_async_shared()
    shared = (
        (q_desc, do_desc, k_desc, v_desc, stats_desc, dq_desc, dk_desc, dv_desc),
        (first_ptr, last_ptr, slopes_ptr, scale, behind, ahead, cap),
        (n_kv_head, seq_q, seq_k, n_tile, n_tiles, heads_at_once, batch_heads),
        (q_s, do_s, k_s, v_s, stats_s, ds_s, dq_s),
        (kv_full, kv_empty, q_full, do_full),
        (drawn, published, taken, counter),
    )
    gl.warp_specialize(
        [
            (_consume, (gl.constexpr(0), shared, GROUP, HEAD_DIM, FROM, TO, DETERMINISTIC)),
            (_consume, (gl.constexpr(1), shared, GROUP, HEAD_DIM, FROM, TO, DETERMINISTIC)),
            (sum_dq, (shared, GROUP, HEAD_DIM, DETERMINISTIC)),
            (_produce, (shared, GROUP, HEAD_DIM, DETERMINISTIC)),
        ],
        [4, 4, 1],
        [CONSUMER_REGISTERS, DQ_REGISTERS, PRODUCER_REGISTERS],
    )
