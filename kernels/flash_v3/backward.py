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
    dQ          one warpgroup (backward_dq.py): it takes dS, multiplies it with K, and has TMA add the product to memory. The
                consumers do not wait for each other from tile to tile, so that one's exponentials run under the other's products.

What passes between them lies in rings of shared memory. TMA's mbarriers say that a buffer is full; mbarriers (of K and V) and named
barriers (of tiles and dS, barriers.py) say that it has been read.

The order in which blocks add to a tile of dQ is that of their arrival or, asked for DETERMINISTIC gradients, from the last keys to
the first: where causality or a window cuts, the block with later keys comes to a tile of queries earlier.

Letters as in flash_v2; a step is one tile of queries of one head, counted through all of a block's work.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ..tile_ops import LOG2E
from .backward_dq import sum_dq
from .barriers import arrive_tile_empty, wait_ds_empty, wait_other_consumer, wait_tile_empty
from .hopper_ops import tma_load, tma_store, wgmma_layout
from .protocol import QUERIES, hand_over_ds, keys_of, kv_slot, tiles_of, width_of
from .schedule import draw, take
from .scores import queries_that_see, tanh_of_ratio, with_distance
from .state import BackwardConstants, BackwardMemory, BackwardRings, BackwardState, BackwardTensors, KernelAsked, Schedule, Sizes

# Registers of a thread: of the second consumer, of dQ's warpgroup (the assembler refuses to go lower), of the producer. The first
# consumer gets the rest of the 512 that four warpgroups share, 208.
CONSUMER_REGISTERS = gl.constexpr(216)
DQ_REGISTERS = gl.constexpr(64)
PRODUCER_REGISTERS = gl.constexpr(24)

# ---- the producer ----


@gluon.jit
def _produce(state, CONSTANTS: gl.constexpr):
    """The producer's warp: for each block K and V, then for each tile that sees it Q with its statistics, and dO."""
    tensors = state.tensors
    sizes = state.sizes
    memory = state.memory
    rings = state.rings
    GROUP: gl.constexpr = CONSTANTS.GROUP
    HEAD_DIM: gl.constexpr = CONSTANTS.HEAD_DIM
    DETERMINISTIC: gl.constexpr = CONSTANTS.DETERMINISTIC
    PARTS: gl.constexpr = HEAD_DIM // width_of(HEAD_DIM)  # of a tile of Q or dO, by columns
    BLOCK: gl.constexpr = keys_of(HEAD_DIM)
    step = 0
    n = 0
    kv_block, batch, kv_head = draw(state.schedule, n, sizes, FROM_LAST=DETERMINISTIC, IN_ORDER=DETERMINISTIC)
    while kv_block >= 0:
        key = kv_block * BLOCK
        tiles = tiles_of(key, BLOCK, batch, state.asked, sizes)
        kv, phase = kv_slot(n, rings.kv_empty.shape[0])
        mbarrier.wait(rings.kv_empty.index(kv), phase ^ 1)
        _load_block(tensors.k, batch, kv_head, key, rings.kv_full.index(2 * kv), memory.k, kv, PARTS)
        _load_block(tensors.v, batch, kv_head, key, rings.kv_full.index(2 * kv + 1), memory.v, kv, PARTS)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            stats_row = (batch * sizes.heads * GROUP + head) * gl.cdiv(sizes.seq_q, QUERIES)
            for q_tile in range(tiles.lowest, tiles.highest + 1):
                slot = step % 2
                wait_tile_empty(slot)
                mbarrier.expect(rings.q_full.index(slot), PARTS * tensors.q.block_type.nbytes + tensors.stats.block_type.nbytes)
                _load_tile(tensors.q, batch, head, q_tile, rings.q_full.index(slot), memory.q, slot, PARTS)
                tma_load(tensors.stats, [stats_row + q_tile, 0], rings.q_full.index(slot), memory.stats.index(slot))
                mbarrier.expect(rings.do_full.index(slot), PARTS * tensors.do.block_type.nbytes)
                _load_tile(tensors.do, batch, head, q_tile, rings.do_full.index(slot), memory.do, slot, PARTS)
                step += 1
        n += 1
        kv_block, batch, kv_head = draw(state.schedule, n, sizes, FROM_LAST=DETERMINISTIC, IN_ORDER=DETERMINISTIC)
    for slot in gl.static_range(2):  # what the consumers have released last
        wait_tile_empty(slot)


@gluon.jit
def _load_block(desc, batch, head, key, full, buffers, kv, PARTS: gl.constexpr):
    """A block of K or V, in two: 64 keys each or, at head_dim 256, 128 columns."""
    mbarrier.expect(full, 2 * desc.block_type.nbytes)
    for half in gl.static_range(2):
        at = [batch, head, key + 64 * half, 0] if PARTS == 1 else [batch, head, key, 128 * half]
        tma_load(desc, at, full, buffers.index(2 * kv + half))


@gluon.jit
def _load_tile(desc, batch, head, q_tile, full, buffers, slot, PARTS: gl.constexpr):
    """A tile of Q or dO, whole or in parts of 128 columns."""
    for part in gl.static_range(PARTS):
        tma_load(desc, [batch, head, q_tile * QUERIES, 128 * part], full, buffers.index(slot * PARTS + part))


# ---- the consumers: tiles that their keys are seen from, and those that they are not ----


@gluon.jit
def _skip_tiles(start, stop, offset, state, W: gl.constexpr, s_layout: gl.constexpr):
    """Passes over tiles that see the other warpgroup's keys and none of this one's: it hands over a dS of zeros."""
    rings = state.rings
    for tile in range(start, stop):
        slot = (offset + tile) % 2
        phase = ((offset + tile) // 2) & 1
        mbarrier.wait(rings.q_full.index(slot), phase)
        mbarrier.wait(rings.do_full.index(slot), phase)
        arrive_tile_empty(slot)
        hand_over_ds(W, gl.zeros([64, QUERIES], state.memory.k.dtype, s_layout), slot, state.memory)


@gluon.jit
def _dp_minus_delta(v, do, stats, zero, s_layout: gl.constexpr):
    """V dO^T - delta. The product's accumulator starts with -delta in every row, so delta needs no registers of its own.

    -delta is made by a subtraction and not stored as such: for a copy from memory Triton 3.9's assembler lacks registers at
    head_dim 128.
    """
    delta = stats.slice(QUERIES, QUERIES, dim=1).load(s_layout)
    return warpgroup_mma(v, do.permute((1, 0)), zero - delta, is_async=True)


@gluon.jit
def _mainloop(
    dk, dv, start, stop, offset, k, v, index, batch, slope, zero, state,
    W: gl.constexpr, CONSTANTS: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The tiles from `start` to before `stop`.

        S^T = K Q^T  ->  P = exp2(S - lse)  -------------------------->  dV += P dO
        dP^T = V dO^T - delta  ->  dS = P dP  ->  to dQ's warpgroup  ->  dK += dS Q

    At head_dim 64 K and V stay in registers. Beyond there is no room for them. Then dP is issued only when the scores have become
    P, and P is rounded for dV only when dS is made of it: rounded, it would need registers of its own beside P. At 256 both
    warpgroups compute all of S and dP, and half of dK's and dV's columns each.
    """
    asked = state.asked
    sizes = state.sizes
    memory = state.memory
    rings = state.rings
    HEAD_DIM: gl.constexpr = CONSTANTS.HEAD_DIM
    s_layout: gl.constexpr = zero.type.layout
    dtype: gl.constexpr = memory.k.dtype
    WIDE: gl.constexpr = HEAD_DIM == 256
    WIDTH: gl.constexpr = width_of(HEAD_DIM)
    PARTS: gl.constexpr = HEAD_DIM // WIDTH
    HALF: gl.constexpr = 0 if WIDE else W  # the keys that are this warpgroup's; at 256 the first columns
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dk.type.layout, k_width=2)
    qk_scale = asked.scale * LOG2E
    keys = index + (sizes.seq_q - sizes.seq_k)
    if MASKED:
        # Each loop that masks computes the intervals again, through a zero that the compiler cannot know. Otherwise it would keep
        # them in registers over the loop between.
        index += (sizes.seq_q - start) >> 31
        first, last = queries_that_see(index, batch, asked, sizes)
        last = gl.where(index < sizes.seq_k, last, -1)
    for step in range(offset + start, offset + stop):
        slot = step & 1
        phase = (step >> 1) & 1
        # Always zero, but the compiler cannot know. Otherwise it would keep addresses of K and V in 24 registers over the loop, and
        # spill.
        opaque_zero = step >> 31
        q = memory.q.index(slot * PARTS).reshape([QUERIES, WIDTH])
        do = memory.do.index(slot * PARTS).reshape([QUERIES, WIDTH])
        k_now = k
        v_now = v
        if HEAD_DIM >= 128:
            k_now = memory.k.index(HALF + opaque_zero).reshape([64, WIDTH])
            v_now = memory.v.index(HALF + opaque_zero).reshape([64, WIDTH])
        mbarrier.wait(rings.q_full.index(slot), phase)
        s_later = warpgroup_mma(k_now, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        if WIDE:
            k_more = memory.k.index(1 + opaque_zero).reshape([64, WIDTH])
            q_more = memory.q.index(slot * PARTS + 1).reshape([QUERIES, WIDTH])
            s_later = warpgroup_mma(k_more, q_more.permute((1, 0)), s_later, is_async=True)
        lse = memory.stats.index(slot).slice(0, QUERIES, dim=1).load(s_layout)
        mbarrier.wait(rings.do_full.index(slot), phase)
        if HEAD_DIM == 64:
            dp_later = _dp_minus_delta(v_now, do, memory.stats.index(slot), zero, s_layout)
        s = warpgroup_mma_wait(1 if HEAD_DIM == 64 else 0, deps=(s_later,))
        queries = (step - offset) * QUERIES + gl.arange(0, QUERIES, layout=gl.SliceLayout(0, s_layout))
        if asked.cap is not None:
            tanh = tanh_of_ratio(s, asked.cap)
            s = asked.cap * tanh
        if slope is not None:
            s = with_distance(s, slope, keys, queries)
        p = gl.exp2(s * qk_scale - lse)
        if MASKED:
            p = gl.where((queries[None, :] >= first[:, None]) & (queries[None, :] <= last[:, None]), p, 0.0)
        if HEAD_DIM >= 128:
            dp_later = _dp_minus_delta(v_now, do, memory.stats.index(slot), zero, s_layout)
        if WIDE:
            v_more = memory.v.index(1 + opaque_zero).reshape([64, WIDTH])
            do_more = memory.do.index(slot * PARTS + 1).reshape([QUERIES, WIDTH])
            dp_later = warpgroup_mma(v_more, do_more.permute((1, 0)), dp_later, is_async=True)
        ds = p * warpgroup_mma_wait(0, deps=(dp_later,))
        if asked.cap is not None:
            ds = ds * (1.0 - tanh * tanh)
        ds = ds.to(dtype)
        if WIDE and W == 1:  # its columns of dV and dK
            do = do_more
            q = q_more
        dv_later = warpgroup_mma(gl.convert_layout(p.to(dtype), operand), do, dv, is_async=True)
        dk_later = warpgroup_mma(gl.convert_layout(ds, operand), q, dk, is_async=True)
        hand_over_ds(W, ds, slot, memory)
        dv, dk = warpgroup_mma_wait(0, deps=(dv_later, dk_later))
        arrive_tile_empty(slot)
    return dk, dv


@gluon.jit
def _consume(W: gl.constexpr, state, CONSTANTS: gl.constexpr):
    """Warpgroup W: keys 64 W to 64 W + 63 of each block or, at head_dim 256, columns 128 W to 128 W + 127."""
    tensors = state.tensors
    asked = state.asked
    sizes = state.sizes
    memory = state.memory
    rings = state.rings
    GROUP: gl.constexpr = CONSTANTS.GROUP
    HEAD_DIM: gl.constexpr = CONSTANTS.HEAD_DIM
    FROM: gl.constexpr = CONSTANTS.FROM
    TO: gl.constexpr = CONSTANTS.TO
    WIDE: gl.constexpr = HEAD_DIM == 256
    WIDTH: gl.constexpr = width_of(HEAD_DIM)
    BLOCK: gl.constexpr = keys_of(HEAD_DIM)
    s_layout: gl.constexpr = wgmma_layout(QUERIES)
    kv_layout: gl.constexpr = wgmma_layout(WIDTH)
    dtype: gl.constexpr = memory.k.dtype
    zero = gl.zeros([64, QUERIES], gl.float32, s_layout)
    for slot in gl.static_range(2):
        arrive_tile_empty(slot)
    done = 0
    n = 0
    kv_block, batch, kv_head = take(state.schedule, n)
    while kv_block >= 0:
        key = kv_block * BLOCK + (0 if WIDE else 64 * W)
        block_tiles = tiles_of(kv_block * BLOCK, BLOCK, batch, asked, sizes)
        tiles = tiles_of(key, 64, batch, asked, sizes)
        all_lowest = block_tiles.lowest
        all_highest = block_tiles.highest
        lowest = tiles.lowest
        highest = tiles.highest
        if asked.first_ptr is not None:
            # document_ids that are not sorted give wrong results; they must not give a barrier that waits for ever.
            all_highest = gl.maximum(all_highest, all_lowest - 1)
            lowest = gl.maximum(lowest, all_lowest)
        lowest = gl.minimum(lowest, all_highest + 1)
        highest = gl.maximum(gl.minimum(highest, all_highest), lowest - 1)
        cut = gl.minimum(gl.maximum(tiles.whole_from, lowest), highest + 1)
        end = highest + 1
        if TO:
            end = gl.maximum(gl.minimum(tiles.whole_to, highest) + 1, cut)
        index = key + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))

        dk = gl.zeros([64, WIDTH], gl.float32, kv_layout)
        dv = gl.zeros([64, WIDTH], gl.float32, kv_layout)
        kv, phase = kv_slot(n, rings.kv_empty.shape[0])
        mbarrier.wait(rings.kv_full.index(2 * kv), phase)
        mbarrier.wait(rings.kv_full.index(2 * kv + 1), phase)
        k = memory.k.index(2 * kv + W).reshape([64, WIDTH])
        v = memory.v.index(2 * kv + W).reshape([64, WIDTH])
        if HEAD_DIM == 64:
            whole: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=s_layout, k_width=2)
            k = k.load(whole)
            v = v.load(whole)
        for member in range(GROUP):
            offset = done - all_lowest
            slope = None
            if asked.slopes_ptr is not None:
                slope = gl.load(asked.slopes_ptr + kv_head * GROUP + member) / asked.scale
            if FROM:
                _skip_tiles(all_lowest, lowest, offset, state, W, s_layout)
            dk, dv = _mainloop(dk, dv, lowest, cut, offset, k, v, index, batch, slope, zero, state, W, CONSTANTS, MASKED=True)
            dk, dv = _mainloop(dk, dv, cut, end, offset, k, v, index, batch, slope, zero, state, W, CONSTANTS, MASKED=False)
            if TO:
                stop = highest + 1
                dk, dv = _mainloop(dk, dv, end, stop, offset, k, v, index, batch, slope, zero, state, W, CONSTANTS, MASKED=True)
                _skip_tiles(stop, all_highest + 1, offset, state, W, s_layout)
            done += gl.maximum(all_highest + 1 - all_lowest, 0)
        # dV and dK leave through V's buffer, since dQ's warpgroup may still read K. This warpgroup alone reads V or, at head_dim
        # 256, both do.
        if WIDE:
            wait_other_consumer(W)
        at = [batch, kv_head, key, 128 * W if WIDE else 0]
        _store_rows(tensors.dv, at, dv.to(dtype), memory.v.index(2 * kv + W), WIDTH)
        _store_rows(tensors.dk, at, (dk * asked.scale).to(dtype), memory.v.index(2 * kv + W), WIDTH)
        mbarrier.arrive(rings.kv_empty.index(kv), count=1)
        n += 1
        kv_block, batch, kv_head = take(state.schedule, n)
    for slot in gl.static_range(2):  # what dQ's warpgroup has released last
        if W == 0 or not WIDE:
            wait_ds_empty(W, slot)


@gluon.jit
def _store_rows(descriptor, coordinates, rows, buffer, WIDTH: gl.constexpr):
    """Writes rows to memory, through a buffer that is free again on return."""
    buffer.reshape([64, WIDTH]).store(rows)
    fence_async_shared()
    tma_store(descriptor, coordinates, buffer)
    tma.store_wait(0)


# ---- the kernel ----

UNSPECIALISED = ["behind", "ahead", "n_kv_head", *Sizes._fields[1:]]  # integers: one compilation serves all lengths


@gluon.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=["first_ptr", "last_ptr", "slopes_ptr", "counter"])
def backward_kernel(
    q_desc, do_desc, k_desc, v_desc, stats_desc, dq_desc, dk_desc, dv_desc, first_ptr, last_ptr, slopes_ptr, counter,
    scale, behind, ahead, cap, n_kv_head, seq_q, seq_k, n_tile, n_tiles, heads_at_once, batch_heads,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BUFFERS: gl.constexpr,
    SWIZZLE: gl.constexpr, FROM: gl.constexpr, TO: gl.constexpr, DETERMINISTIC: gl.constexpr,
):  # fmt: skip
    """Allocates shared memory and barriers, and sends each warpgroup to its work.

    `counter` is the next block of keys to draw, and behind it one number for each tile of queries. What the other arguments are,
    KernelAsked, Sizes and BackwardConstants say.
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
    CONSTANTS: gl.constexpr = BackwardConstants(
        GROUP=GROUP, HEAD_DIM=HEAD_DIM, BUFFERS=BUFFERS, SWIZZLE=SWIZZLE, FROM=FROM, TO=TO, DETERMINISTIC=DETERMINISTIC
    )
    state = BackwardState(
        tensors=BackwardTensors(q=q_desc, do=do_desc, k=k_desc, v=v_desc, stats=stats_desc, dq=dq_desc, dk=dk_desc, dv=dv_desc),
        asked=KernelAsked(
            first_ptr=first_ptr, last_ptr=last_ptr, slopes_ptr=slopes_ptr, scale=scale, behind=behind, ahead=ahead, cap=cap
        ),
        sizes=Sizes(
            heads=n_kv_head, seq_q=seq_q, seq_k=seq_k,
            n_tile=n_tile, n_tiles=n_tiles, heads_at_once=heads_at_once, batch_heads=batch_heads,
        ),
        memory=BackwardMemory(q=q_s, do=do_s, k=k_s, v=v_s, stats=stats_s, ds=ds_s, dq=dq_s),
        rings=BackwardRings(kv_full=kv_full, kv_empty=kv_empty, q_full=q_full, do_full=do_full),
        schedule=Schedule(drawn=drawn, published=published, taken=taken, counter=counter),
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (gl.constexpr(0), state, CONSTANTS)),
            (_consume, (gl.constexpr(1), state, CONSTANTS)),
            (sum_dq, (state, CONSTANTS)),
            (_produce, (state, CONSTANTS)),
        ],
        [4, 4, 1],
        [CONSUMER_REGISTERS, DQ_REGISTERS, PRODUCER_REGISTERS],
    )
