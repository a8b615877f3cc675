"""dQ's warpgroup in flash_v3's backward."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .hopper_ops import await_at_least, publish, take, tma_add
from .protocol import QUERIES, await_ds, keys_of, kv_slot, release_ds, tiles_of, width_of


@gluon.jit
def sum_dq(shared, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, DETERMINISTIC: gl.constexpr):
    """dQ = dS^T K of each tile, 64 columns at a time, added to the sum in memory in the order in which the threads hold it.

    16 bytes of each thread lie side by side, so that shared memory is written without bank conflicts; flash_v3_ends puts them in
    their places. DETERMINISTIC: a tile's counter says how many blocks of keys its sum has passed, counted from the last, and each
    waits for the one before it, which was drawn earlier.
    """
    tensors, meaning, sizes, memory, rings, schedule = shared
    _, _, _, _, _, dq_desc, _, _ = tensors
    first_ptr, last_ptr, _, _, behind, ahead, _ = meaning
    n_kv_head, seq_q, seq_k, n_tile, _, _, _ = sizes
    _, _, k_s, _, _, ds_s, dq_s = memory
    kv_full, kv_empty, _, _ = rings
    _, _, _, counter = schedule
    STRIPS: gl.constexpr = HEAD_DIM // 64
    BLOCK: gl.constexpr = keys_of(HEAD_DIM)
    HALVES: gl.constexpr = BLOCK // 64  # of dS, 64 keys each: two, or at head_dim 256 one
    WIDTH: gl.constexpr = width_of(HEAD_DIM)
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    zero = gl.zeros([QUERIES, 64], gl.float32, layout)
    release_ds(0, HALVES)
    release_ds(1, HALVES)
    step = 0
    n = 0
    place, batch, kv_head = take(schedule, n)
    while place >= 0:
        lowest, highest, whole_from, whole_to = tiles_of(
            place * BLOCK, BLOCK, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr
        )
        if DETERMINISTIC:
            turn = n_tile - 1 - place
            from_tile, to_tile, whole_from, whole_to = tiles_of(
                gl.minimum(place + 1, n_tile - 1) * BLOCK, BLOCK, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr
            )
        kv, phase = kv_slot(n, kv_empty.shape[0])
        mbarrier.wait(kv_full.index(2 * kv), phase)
        for member in range(GROUP):
            head_tiles = ((batch * n_kv_head + kv_head) * GROUP + member) * gl.cdiv(seq_q, QUERIES)
            passed = counter + 1 + head_tiles
            for q_tile in range(lowest, highest + 1):
                slot = step % 2
                nought = step >> 31  # zero, as in flash_v3_backward._seen
                if DETERMINISTIC and turn > 0 and q_tile >= from_tile and q_tile <= to_tile:
                    await_at_least(passed + q_tile, turn)
                await_ds(slot, HALVES)
                for strip in gl.static_range(STRIPS):
                    k0 = k_s.index(2 * kv + strip // 2 * (2 - HALVES) + nought).reshape([64, WIDTH])
                    k0 = k0.slice(64 * strip % WIDTH, 64, dim=1)
                    dq = warpgroup_mma(ds_s.index(slot).permute((1, 0)), k0, zero, use_acc=False, is_async=True)
                    if HALVES == 2:
                        k1 = k_s.index(2 * kv + 1 + nought).reshape([64, WIDTH]).slice(64 * strip, 64, dim=1)
                        dq = warpgroup_mma(ds_s.index(2 + slot).permute((1, 0)), k1, dq, is_async=True)
                    dq = warpgroup_mma_wait(0, deps=(dq,))
                    if strip == STRIPS - 1:
                        release_ds(slot, HALVES)
                    held = dq.reshape([4, 2, 8, 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([2 * QUERIES, 32])
                    buffer = dq_s.index(slot if STRIPS == 1 else strip % dq_s.shape[0])
                    tma.store_wait(dq_s.shape[0] - 1)
                    buffer.store(held)
                    fence_async_shared()
                    tma_add(dq_desc, [((head_tiles + q_tile) * STRIPS + strip) * (2 * QUERIES), 0], buffer)
                if DETERMINISTIC and q_tile > lowest:
                    publish(passed + q_tile - 1, turn + 1, PENDING=STRIPS)
                step += 1
            if DETERMINISTIC and highest >= lowest:
                publish(passed + highest, turn + 1, PENDING=0)
        mbarrier.arrive(kv_empty.index(kv), count=1)
        n += 1
        place, batch, kv_head = take(schedule, n)
    tma.store_wait(0)
