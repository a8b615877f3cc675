"""flash_v3's named barriers, all in one table.

A GPU gives a block sixteen, and Triton takes 0 to 4. Whoever arrives goes on. Whoever waits goes on when all threads of the barrier
have come, and sees what they had written.

    name            number          kernel    who arrives                   who waits             threads
    PUBLISHED       5               backward  the warps of dQ's warpgroup   the same              128
    DS_FULL         6 + slot        backward  the consumers that store dS   dQ's warpgroup        384, at head_dim 256 256
    DS_EMPTY        8 + 2 slot + W  backward  dQ's warpgroup has read dS    consumer W            256
    OTHER_CONSUMER  9 + 2 W         backward  the other consumer            consumer W            256, only at head_dim 256
    TENSOR_CORES    10 + W          forward   the consumer before W         consumer W            256
    TILE_EMPTY      12 + slot       backward  both consumers have read      the producer (1 warp) 288

W is a consumer's number, slot that of a buffer. Buffers alternate with the step, and so do the barriers' numbers: with one number a
warpgroup could arrive twice for one wait. At head_dim 256 consumer 0 alone stores dS, and 9 and 11 are free for OTHER_CONSUMER.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

PUBLISHED = gl.constexpr(5)
DS_FULL = gl.constexpr(6)
DS_EMPTY = gl.constexpr(8)
OTHER_CONSUMER = gl.constexpr(9)
TENSOR_CORES = gl.constexpr(10)
TILE_EMPTY = gl.constexpr(12)

WARP = gl.constexpr(32)  # threads
WARPGROUP = gl.constexpr(128)


# ---- the instruction ----


@gluon.constexpr_function
def barrier_text(operation: str, number: object, threads: int) -> str:
    """PTX of bar.sync or bar.arrive; `number` may be an operand."""
    return f"bar.{operation} {number}, {threads}; mov.b32 $0, $1;"


@gluon.jit
def _barrier(OPERATION: gl.constexpr, number, THREADS: gl.constexpr, WARPS: gl.constexpr = 4):
    """bar.sync or bar.arrive by all threads of WARPS warps, on a barrier of THREADS threads in all."""
    TEXT: gl.constexpr = barrier_text(OPERATION, "$1", THREADS)
    numbers = gl.full([32 * WARPS], number, gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.inline_asm_elementwise(TEXT, "=r,r", [numbers], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _barrier_of_two(OPERATION: gl.constexpr, NUMBER: gl.constexpr):
    """`_barrier` of two warpgroups, with its number in the instruction."""
    TEXT: gl.constexpr = barrier_text(OPERATION, NUMBER, 2 * WARPGROUP)
    thread = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise(TEXT, "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)


# ---- forward: whose turn it is at the tensor cores ----


@gluon.jit
def take_tensor_cores(W: gl.constexpr):
    """Consumer W: waits for its turn."""
    _barrier_of_two("sync", TENSOR_CORES + W)


@gluon.jit
def pass_tensor_cores(W: gl.constexpr, WARPGROUPS: gl.constexpr):
    """Consumer W: the next one's turn begins."""
    _barrier_of_two("arrive", TENSOR_CORES + (W + 1) % WARPGROUPS)


# ---- backward ----


@gluon.jit
def arrive_tile_empty(slot):
    """A consumer: it has read what the rings hold of a tile, Q, its statistics and dO."""
    _barrier("arrive", TILE_EMPTY + slot, 2 * WARPGROUP + WARP)


@gluon.jit
def wait_tile_empty(slot):
    """The producer: both consumers have read the tile."""
    _barrier("sync", TILE_EMPTY + slot, 2 * WARPGROUP + WARP, WARPS=1)


@gluon.jit
def arrive_ds_full(slot, HALVES: gl.constexpr):
    """A consumer: it has stored its dS."""
    _barrier("arrive", DS_FULL + slot, WARPGROUP + WARPGROUP * HALVES)


@gluon.jit
def wait_ds_full(slot, HALVES: gl.constexpr):
    """dQ's warpgroup: the consumers have stored dS: a half each, or the first of them all of it."""
    _barrier("sync", DS_FULL + slot, WARPGROUP + WARPGROUP * HALVES)


@gluon.jit
def arrive_ds_empty(slot, HALVES: gl.constexpr):
    """dQ's warpgroup: it has read the consumers' dS."""
    for half in gl.static_range(HALVES):
        _barrier("arrive", DS_EMPTY + slot * 2 + half, 2 * WARPGROUP)


@gluon.jit
def wait_ds_empty(W: gl.constexpr, slot):
    """Consumer W: its dS of the step before last has been read."""
    _barrier("sync", DS_EMPTY + slot * 2 + W, 2 * WARPGROUP)


@gluon.jit
def wait_other_consumer(W: gl.constexpr):
    """Consumer W at head_dim 256: the other one has come here too.

    Each has a barrier of its own, at which nobody else waits: of two that wait at one barrier, each at its own copy of the
    instruction, compute-sanitizer's synccheck says that they diverge.
    """
    _barrier("arrive", OTHER_CONSUMER + 2 * (1 - W), 2 * WARPGROUP)
    _barrier("sync", OTHER_CONSUMER + 2 * W, 2 * WARPGROUP)
