"""flash_v3's forward: FlashAttention-3 on Hopper, in Gluon.

Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision" (2024), sections 3.1 and 3.2. One
block per multiprocessor stays for the whole launch and draws tiles of queries from a counter. Inside it:

    producer    one warp. It draws the next tile, publishes where that is, and has TMA bring Q once and K and V block by block
                into rings of shared memory.
    consumers   two or three warpgroups, 64 queries each. Q K^T of the next block is issued before P V of this one, so that the
                softmax of one runs under the products of the other; named barriers pass the tensor cores from warpgroup to
                warpgroup ("ping-pong"), so that one's softmax runs under another's products. What the softmax leaves out is in
                softmax.py.

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
from .barriers import pass_tensor_cores, take_tensor_cores
from .hopper_ops import reinterpreted, tma_load, tma_store, wgmma_layout
from .schedule import draw, take
from .scores import Rows, Span, keys_seen_by, mask, softcap_and_alibi
from .softmax import as_operand, pad_keys, rescaled, softmax_of_first, softmax_of_next
from .state import ForwardConstants, ForwardMemory, ForwardRings, ForwardState, ForwardTensors, KernelAsked, Schedule, Sizes

# ---- which keys ----


@gluon.jit
def _blocks(row, ROWS: gl.constexpr, BLOCK_K: gl.constexpr, batch, asked, sizes):
    """Span of the blocks of keys that the ROWS queries from `row` on see. It has at least one block."""
    start, all_to = keys_seen_by(row, batch, asked, sizes)
    all_from, end = keys_seen_by(row + ROWS - 1, batch, asked, sizes)
    lowest = start // BLOCK_K
    highest = gl.maximum(gl.maximum(end, 0) // BLOCK_K, lowest)
    whole_from = gl.cdiv(all_from, BLOCK_K)
    whole_to = gl.maximum(all_to + 1, 0) // BLOCK_K - 1
    return Span(lowest=lowest, highest=highest, whole_from=whole_from, whole_to=whole_to)


# ---- the producer ----


@gluon.jit
def _produce(state, CONSTANTS: gl.constexpr):
    """The producer's warp: for each tile K of the last block, Q, V of the last block, then K and V of each block before."""
    tensors = state.tensors
    memory = state.memory
    rings = state.rings
    GROUP: gl.constexpr = CONSTANTS.GROUP
    WARPGROUPS: gl.constexpr = CONSTANTS.WARPGROUPS
    BLOCK_K: gl.constexpr = CONSTANTS.BLOCK_K
    BUFFERS: gl.constexpr = CONSTANTS.BUFFERS
    ROWS: gl.constexpr = WARPGROUPS * 64
    step = 0
    n = 0
    q_tile, batch, head = draw(state.schedule, n, state.sizes, FROM_LAST=True)  # with causality the longest first
    while q_tile >= 0:
        blocks = _blocks(q_tile * ROWS, ROWS, BLOCK_K, batch, state.asked, state.sizes)
        for i in range(blocks.highest - blocks.lowest + 1):
            slot = step % BUFFERS
            phase = (step // BUFFERS) & 1
            row = (blocks.highest - i) * BLOCK_K
            mbarrier.wait(rings.k_empty.index(slot), phase ^ 1)
            mbarrier.expect(rings.k_full.index(slot), tensors.k.block_type.nbytes)
            tma_load(tensors.k, [batch, head // GROUP, row, 0], rings.k_full.index(slot), memory.k.index(slot))
            if i == 0:
                for w in gl.static_range(WARPGROUPS):
                    mbarrier.wait(rings.q_empty.index(w), (n & 1) ^ 1)
                    mbarrier.expect(rings.q_full.index(w), tensors.q.block_type.nbytes)
                    tma_load(tensors.q, [batch, head, q_tile * ROWS + 64 * w, 0], rings.q_full.index(w), memory.q.index(w))
            mbarrier.wait(rings.v_empty.index(slot), phase ^ 1)
            mbarrier.expect(rings.v_full.index(slot), tensors.v.block_type.nbytes)
            tma_load(tensors.v, [batch, head // GROUP, row, 0], rings.v_full.index(slot), memory.v.index(slot))
            step += 1
        n += 1
        q_tile, batch, head = draw(state.schedule, n, state.sizes, FROM_LAST=True)


# ---- the consumers ----


@gluon.jit
def _skip_blocks(n_blocks, step, state, W: gl.constexpr, CONSTANTS: gl.constexpr):
    """Releases, unread, blocks that other warpgroups see and this one does not."""
    rings = state.rings
    BUFFERS: gl.constexpr = CONSTANTS.BUFFERS
    for _ in range(n_blocks):
        slot = step % BUFFERS
        phase = (step // BUFFERS) & 1
        take_tensor_cores(W)
        pass_tensor_cores(W, CONSTANTS.WARPGROUPS)
        mbarrier.wait(rings.k_full.index(slot), phase)
        mbarrier.arrive(rings.k_empty.index(slot), count=1)
        mbarrier.wait(rings.v_full.index(slot), phase)
        mbarrier.arrive(rings.v_empty.index(slot), count=1)
        step += 1
    return step


@gluon.jit
def _mainloop(
    acc, l, m, p, block, n_blocks, step, q, rows, state,
    W: gl.constexpr, CONSTANTS: gl.constexpr, MASKED: gl.constexpr, FROM: gl.constexpr,
):  # fmt: skip
    """Blocks from `block` downwards. Each step makes the scores of its block and the product P V that the block before still owes.

        take the tensor cores  ->  S = Q K^T of this block, O += P V of the one before  ->  pass them on  ->  P of this block

    With two warpgroups a warpgroup's softmax also runs under its own P V. With three there are no registers for one P beside the
    next, and the products of the others suffice.
    """
    cap = state.asked.cap
    memory = state.memory
    rings = state.rings
    WARPGROUPS: gl.constexpr = CONSTANTS.WARPGROUPS
    BLOCK_K: gl.constexpr = CONSTANTS.BLOCK_K
    HEAD_DIM: gl.constexpr = CONSTANTS.HEAD_DIM
    BUFFERS: gl.constexpr = CONSTANTS.BUFFERS
    OVERLAP: gl.constexpr = WARPGROUPS == 2
    s_layout: gl.constexpr = wgmma_layout(BLOCK_K)
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=wgmma_layout(HEAD_DIM), k_width=2)
    dtype: gl.constexpr = memory.k.dtype
    qk_scale = state.asked.scale * LOG2E
    zero = gl.zeros([64, BLOCK_K], gl.float32, s_layout)
    for i in range(n_blocks):
        v_slot = step % BUFFERS  # the block before's
        v_phase = (step // BUFFERS) & 1
        step += 1
        k_slot = step % BUFFERS
        mbarrier.wait(rings.k_full.index(k_slot), (step // BUFFERS) & 1)
        take_tensor_cores(W)
        k = memory.k.index(k_slot).reshape([BLOCK_K, HEAD_DIM])
        s_later = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        if OVERLAP:
            opaque_zero = step >> 31  # always zero, which the compiler cannot know
            p = p ^ opaque_zero  # so P has to leave the registers in which the next one is made
        p_now = as_operand(p, dtype, p_layout)
        mbarrier.wait(rings.v_full.index(v_slot), v_phase)
        o_later = warpgroup_mma(p_now, memory.v.index(v_slot).reshape([BLOCK_K, HEAD_DIM]), acc, is_async=True)
        pass_tensor_cores(W, WARPGROUPS)
        if OVERLAP:
            s = warpgroup_mma_wait(1, deps=(s_later,))
        else:
            s, acc = warpgroup_mma_wait(0, deps=(s_later, o_later))
            mbarrier.arrive(rings.v_empty.index(v_slot), count=1)
        mbarrier.arrive(rings.k_empty.index(k_slot), count=1)
        if MASKED or cap is not None or rows.slope is not None:
            cols = (block - i) * BLOCK_K + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, s_layout))
            s = softcap_and_alibi(s, cols, rows, cap)
            if MASKED:
                s = mask(s, cols, rows, FROM)
        p_next, m, l, rescale = softmax_of_next(s, m, l, qk_scale, dtype)
        p = gl.convert_layout(p_next, p.type.layout)
        if OVERLAP:
            acc = warpgroup_mma_wait(0, deps=(o_later,))
            mbarrier.arrive(rings.v_empty.index(v_slot), count=1)
        acc = rescaled(acc, rescale)
    return acc, l, m, p, step


@gluon.jit
def _consume(W: gl.constexpr, state, CONSTANTS: gl.constexpr):
    """Warpgroup W: rows 64 W to 64 W + 63 of every tile.

    prologue  S and P of the last block that the rows see, always masked
    mainloop  down to their first block: blocks cut at their end, whole blocks, blocks cut at their start
    epilogue  the last P V; lse and O to memory
    """
    tensors = state.tensors
    asked = state.asked
    sizes = state.sizes
    memory = state.memory
    rings = state.rings
    WARPGROUPS: gl.constexpr = CONSTANTS.WARPGROUPS
    BLOCK_K: gl.constexpr = CONSTANTS.BLOCK_K
    HEAD_DIM: gl.constexpr = CONSTANTS.HEAD_DIM
    BUFFERS: gl.constexpr = CONSTANTS.BUFFERS
    ROWS: gl.constexpr = WARPGROUPS * 64
    FROM: gl.constexpr = asked.behind is not None or asked.first_ptr is not None
    s_layout: gl.constexpr = wgmma_layout(BLOCK_K)
    o_layout: gl.constexpr = wgmma_layout(HEAD_DIM)
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    dtype: gl.constexpr = memory.k.dtype
    qk_scale = asked.scale * LOG2E
    # The keys of the last block that this warpgroup sees. HALF: causality lets the first of two see the first half.
    NEAR: gl.constexpr = 64 if CONSTANTS.HALF and W == 0 else BLOCK_K
    near_layout: gl.constexpr = wgmma_layout(NEAR)
    near_zero = gl.zeros([64, NEAR], gl.float32, near_layout)
    if W == WARPGROUPS - 1:
        pass_tensor_cores(W, WARPGROUPS)  # warpgroup 0 may start
    step = 0
    n = 0
    q_tile, batch, head = take(state.schedule, n)
    while q_tile >= 0:
        row = q_tile * ROWS + 64 * W
        slope = None
        if asked.slopes_ptr is not None:
            slope = gl.load(asked.slopes_ptr + head) / asked.scale
        tile_blocks = _blocks(q_tile * ROWS, ROWS, BLOCK_K, batch, asked, sizes)
        blocks = _blocks(row, 64, BLOCK_K, batch, asked, sizes)
        lowest = blocks.lowest
        highest = blocks.highest
        if asked.first_ptr is not None:
            # document_ids that are not sorted give wrong results; they must not give a barrier that waits for ever.
            lowest = gl.minimum(gl.maximum(lowest, tile_blocks.lowest), tile_blocks.highest)
            highest = gl.maximum(gl.minimum(highest, tile_blocks.highest), lowest)
        index = row + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
        first, last = keys_seen_by(index, batch, asked, sizes)
        rows = Rows(positions=index + (sizes.seq_k - sizes.seq_q), first=first, last=last, slope=slope)

        step = _skip_blocks(tile_blocks.highest - highest, step, state, W, CONSTANTS)
        mbarrier.wait(rings.q_full.index(W), n & 1)
        q = memory.q.index(W).reshape([64, HEAD_DIM])
        if CONSTANTS.Q_IN_REGISTERS:
            q = q.load(gl.DotOperandLayout(operand_index=0, parent=s_layout, k_width=2))
            mbarrier.arrive(rings.q_empty.index(W), count=1)
        slot = step % BUFFERS
        mbarrier.wait(rings.k_full.index(slot), (step // BUFFERS) & 1)
        take_tensor_cores(W)
        near = memory.k.index(slot).reshape([BLOCK_K, HEAD_DIM]).slice(0, NEAR)
        s = warpgroup_mma(q, near.permute((1, 0)), near_zero, use_acc=False, is_async=True)
        pass_tensor_cores(W, WARPGROUPS)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(rings.k_empty.index(slot), count=1)
        cols = highest * BLOCK_K + gl.arange(0, NEAR, layout=gl.SliceLayout(0, near_layout))
        near_row: gl.constexpr = gl.SliceLayout(1, near_layout)
        near_rows = Rows(
            positions=gl.convert_layout(rows.positions, near_row),
            first=gl.convert_layout(rows.first, near_row), last=gl.convert_layout(rows.last, near_row), slope=slope,
        )  # fmt: skip
        s = mask(softcap_and_alibi(s, cols, near_rows, asked.cap), cols, near_rows, FROM)
        p, m, l = softmax_of_first(s, qk_scale, dtype)
        if NEAR < BLOCK_K:
            p = pad_keys(p)
        acc = gl.zeros([64, HEAD_DIM], gl.float32, o_layout)
        block = highest - 1
        if CONSTANTS.BETWEEN:  # further blocks that the diagonal or a document's end cuts
            cut = gl.maximum(gl.minimum(block - blocks.whole_to, block - lowest + 1), 0)
            acc, l, m, p, step = _mainloop(acc, l, m, p, block, cut, step, q, rows, state, W, CONSTANTS, MASKED=True, FROM=FROM)
            block -= cut
        whole = block - lowest + 1
        if FROM:
            whole = gl.maximum(gl.minimum(whole, block - blocks.whole_from + 1), 0)
        acc, l, m, p, step = _mainloop(acc, l, m, p, block, whole, step, q, rows, state, W, CONSTANTS, MASKED=False, FROM=FROM)
        if FROM:  # blocks that the window or a document's start cuts
            block -= whole
            cut = block - lowest + 1
            acc, l, m, p, step = _mainloop(acc, l, m, p, block, cut, step, q, rows, state, W, CONSTANTS, MASKED=True, FROM=FROM)
        if not CONSTANTS.Q_IN_REGISTERS and HEAD_DIM < 256:
            mbarrier.arrive(rings.q_empty.index(W), count=1)  # the last read of Q is done
        slot = step % BUFFERS
        mbarrier.wait(rings.v_full.index(slot), (step // BUFFERS) & 1)
        v = memory.v.index(slot).reshape([BLOCK_K, HEAD_DIM])
        acc = warpgroup_mma(as_operand(p, dtype, p_layout), v, acc, is_async=True)
        sums = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, s_layout))
        m_of_rows = gl.convert_layout(gl.max(m, 1), gl.SliceLayout(1, s_layout))
        blind = sums == 0.0  # rows that see no key
        lse = gl.where(blind, float("-inf"), (m_of_rows * qk_scale + gl.log2(sums)) * LN2)
        gl.store(tensors.lse_ptr + (batch.to(gl.int64) * sizes.heads + head) * sizes.seq_q + index, lse, mask=index < sizes.seq_q)
        share = gl.where(blind, 0.0, 1.0 / sums)
        tma.store_wait(0)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(rings.v_empty.index(slot), count=1)
        step += 1
        if FROM:
            step = _skip_blocks(lowest - tile_blocks.lowest, step, state, W, CONSTANTS)
        o = memory.o.index(W)
        out = (acc * gl.convert_layout(share, gl.SliceLayout(1, o_layout))[:, None]).to(o.dtype)
        if o.shape[3] == HEAD_DIM:
            o.reshape([64, HEAD_DIM]).store(out)
            fence_async_shared()
            tma_store(tensors.o, [batch, head, row, 0], o)
        else:
            _store_in_halves(tensors.o, batch, head, row, out, o)
        if HEAD_DIM == 256:
            tma.store_wait(0)  # O lies in Q's place
            mbarrier.arrive(rings.q_empty.index(W), count=1)
        n += 1
        q_tile, batch, head = take(state.schedule, n)
    if W == 0:
        take_tensor_cores(W)  # what the last warpgroup has passed on
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


# ---- the kernel ----

UNSPECIALISED = ["behind", "ahead", "n_head", *Sizes._fields[1:]]  # integers: one compilation serves all lengths


@gluon.jit(
    do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=["lse_ptr", "first_ptr", "last_ptr", "slopes_ptr", "counter"]
)
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, first_ptr, last_ptr, slopes_ptr, counter, scale, behind, ahead, cap,
    n_head, seq_q, seq_k, n_tile, n_tiles, heads_at_once, batch_heads,
    GROUP: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_K: gl.constexpr, HEAD_DIM: gl.constexpr, BUFFERS: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, BETWEEN: gl.constexpr, HALF: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Allocates shared memory and barriers, and sends each warpgroup to its work.

    `counter` is the next tile to draw. What the other arguments are, KernelAsked, Sizes and ForwardConstants say.
    """
    q_s = gl.allocate_shared_memory(q_desc.dtype, [WARPGROUPS, 1, 1, 64, HEAD_DIM], q_desc.layout)
    if HEAD_DIM < 256:
        o_s = gl.allocate_shared_memory(o_desc.dtype, [WARPGROUPS, 1, 1, 64, HEAD_DIM], o_desc.layout)
    else:  # there is no room for both, nor for all columns in float32
        o_s = reinterpreted(q_s, o_desc.dtype, [WARPGROUPS, 1, 1, 64, o_desc.block_type.shape[3]], o_desc.layout)
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
    CONSTANTS: gl.constexpr = ForwardConstants(
        GROUP=GROUP, WARPGROUPS=WARPGROUPS, BLOCK_K=BLOCK_K, HEAD_DIM=HEAD_DIM, BUFFERS=BUFFERS,
        Q_IN_REGISTERS=Q_IN_REGISTERS, BETWEEN=BETWEEN, HALF=HALF,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS,
    )  # fmt: skip
    state = ForwardState(
        tensors=ForwardTensors(q=q_desc, k=k_desc, v=v_desc, o=o_desc, lse_ptr=lse_ptr),
        asked=KernelAsked(
            first_ptr=first_ptr, last_ptr=last_ptr, slopes_ptr=slopes_ptr, scale=scale, behind=behind, ahead=ahead, cap=cap
        ),
        sizes=Sizes(
            heads=n_head, seq_q=seq_q, seq_k=seq_k,
            n_tile=n_tile, n_tiles=n_tiles, heads_at_once=heads_at_once, batch_heads=batch_heads,
        ),
        memory=ForwardMemory(q=q_s, o=o_s, k=k_s, v=v_s),
        rings=ForwardRings(q_full=q_full, q_empty=q_empty, k_full=k_full, k_empty=k_empty, v_full=v_full, v_empty=v_empty),
        schedule=Schedule(drawn=drawn, published=published, taken=taken, counter=counter),
    )  # fmt: skip
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), state, CONSTANTS)),
                (_consume, (gl.constexpr(1), state, CONSTANTS)),
                (_produce, (state, CONSTANTS)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), state, CONSTANTS)),
                (_consume, (gl.constexpr(1), state, CONSTANTS)),
                (_consume, (gl.constexpr(2), state, CONSTANTS)),
                (_produce, (state, CONSTANTS)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
