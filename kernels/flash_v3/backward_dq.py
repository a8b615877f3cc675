"""dQ's warpgroup in flash_v3's backward."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .barriers import arrive_ds_empty, wait_ds_full
from .hopper_ops import await_at_least, publish, tma_add, wgmma_layout
from .protocol import QUERIES, keys_of, kv_slot, tiles_of, width_of
from .schedule import take


@gluon.jit
def sum_dq(state, CONSTANTS: gl.constexpr):
    """dQ = dS^T K of each tile, 64 columns at a time, added to the sum in memory in the order in which the threads hold it.

        wait for dS  ->  dQ = dS^T K (wgmma)  ->  release dS  ->  shared memory  ->  TMA adds it to the sum

    16 bytes of each thread lie side by side, so that shared memory is written without bank conflicts; pre_post.py puts them in
    their places. DETERMINISTIC: a tile's counter says how many blocks of keys its sum has passed, counted from the last, and each
    waits for the one before it, which was drawn earlier.
    """
    asked = state.asked
    sizes = state.sizes
    memory = state.memory
    rings = state.rings
    GROUP: gl.constexpr = CONSTANTS.GROUP
    HEAD_DIM: gl.constexpr = CONSTANTS.HEAD_DIM
    DETERMINISTIC: gl.constexpr = CONSTANTS.DETERMINISTIC
    STRIPS: gl.constexpr = HEAD_DIM // 64
    BLOCK: gl.constexpr = keys_of(HEAD_DIM)
    HALVES: gl.constexpr = BLOCK // 64  # of dS, 64 keys each: two, or at head_dim 256 one
    WIDTH: gl.constexpr = width_of(HEAD_DIM)
    zero = gl.zeros([QUERIES, 64], gl.float32, wgmma_layout(64))
    arrive_ds_empty(0, HALVES)
    arrive_ds_empty(1, HALVES)
    step = 0
    n = 0
    kv_block, batch, kv_head = take(state.schedule, n)
    while kv_block >= 0:
        tiles = tiles_of(kv_block * BLOCK, BLOCK, batch, asked, sizes)
        if DETERMINISTIC:
            turn = sizes.n_tile - 1 - kv_block
            next_key = gl.minimum(kv_block + 1, sizes.n_tile - 1) * BLOCK
            next_tiles = tiles_of(next_key, BLOCK, batch, asked, sizes)
        kv, phase = kv_slot(n, rings.kv_empty.shape[0])
        mbarrier.wait(rings.kv_full.index(2 * kv), phase)
        for member in range(GROUP):
            head_tiles = ((batch * sizes.heads + kv_head) * GROUP + member) * gl.cdiv(sizes.seq_q, QUERIES)
            passed = state.schedule.counter + 1 + head_tiles
            for q_tile in range(tiles.lowest, tiles.highest + 1):
                slot = step % 2
                opaque_zero = step >> 31  # as in backward.py's _mainloop
                if DETERMINISTIC and turn > 0 and q_tile >= next_tiles.lowest and q_tile <= next_tiles.highest:
                    await_at_least(passed + q_tile, turn)
                wait_ds_full(slot, HALVES)
                for strip in gl.static_range(STRIPS):
                    k0 = memory.k.index(2 * kv + strip // 2 * (2 - HALVES) + opaque_zero).reshape([64, WIDTH])
                    k0 = k0.slice(64 * strip % WIDTH, 64, dim=1)
                    dq = warpgroup_mma(memory.ds.index(slot).permute((1, 0)), k0, zero, use_acc=False, is_async=True)
                    if HALVES == 2:
                        k1 = memory.k.index(2 * kv + 1 + opaque_zero).reshape([64, WIDTH]).slice(64 * strip, 64, dim=1)
                        dq = warpgroup_mma(memory.ds.index(2 + slot).permute((1, 0)), k1, dq, is_async=True)
                    dq = warpgroup_mma_wait(0, deps=(dq,))
                    if strip == STRIPS - 1:
                        arrive_ds_empty(slot, HALVES)
                    held = dq.reshape([4, 2, 8, 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([2 * QUERIES, 32])
                    buffer = memory.dq.index(slot if STRIPS == 1 else strip % memory.dq.shape[0])
                    tma.store_wait(memory.dq.shape[0] - 1)
                    buffer.store(held)
                    fence_async_shared()
                    tma_add(state.tensors.dq, [((head_tiles + q_tile) * STRIPS + strip) * (2 * QUERIES), 0], buffer)
                if DETERMINISTIC and q_tile > tiles.lowest:
                    publish(passed + q_tile - 1, turn + 1, PENDING=STRIPS)
                step += 1
            if DETERMINISTIC and tiles.highest >= tiles.lowest:
                publish(passed + tiles.highest, turn + 1, PENDING=0)
        mbarrier.arrive(rings.kv_empty.index(kv), count=1)
        n += 1
        kv_block, batch, kv_head = take(state.schedule, n)
    tma.store_wait(0)
