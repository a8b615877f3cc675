"""What the warpgroups of flash_v3's backward agree on: which tiles a block walks, and who waits for whom.

The second half are named barriers: whoever arrives goes on, whoever waits has every thread's word. Buffers alternate with the
step, and so do the barriers' numbers: with one number a warpgroup could arrive twice for one wait.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .hopper_ops import barrier, interval

QUERIES = gl.constexpr(64)  # of a tile
NEVER = gl.constexpr(2**30)  # a tile that does not come


@gluon.constexpr_function
def keys_of(head_dim: int) -> int:
    """Keys of a block: 64 to a consumer or, at head_dim 256, 64 for both."""
    return 64 if head_dim == 256 else 128


@gluon.constexpr_function
def width_of(head_dim: int) -> int:
    """Columns that a tile has in one piece of shared memory."""
    return min(head_dim, 128)


@gluon.jit
def kv_slot(n, BUFFERS: gl.constexpr):
    """Where the n-th block of keys and values lies in shared memory, and the phase of its barriers."""
    return n % BUFFERS, (n // BUFFERS) & 1


# ---- which tiles ----


@gluon.jit
def tiles_of(key, ROWS: gl.constexpr, batch, seq_q, seq_k, behind, ahead, first_ptr, last_ptr):
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


# ---- who tells whom ----


@gluon.jit
def release(slot):
    """A consumer: it has read what the rings hold of a tile, Q, its statistics and dO."""
    barrier("arrive", 12 + slot, 288)


@gluon.jit
def await_release(slot):
    """The producer: both consumers have."""
    barrier("sync", 12 + slot, 288, WARPS=1)


@gluon.jit
def hand_over_ds(W: gl.constexpr, ds, slot, memory):
    """A consumer: stores its dS, once dQ's warpgroup has read the one before in this buffer, and says so."""
    _, _, _, _, _, ds_s, _ = memory
    HALVES: gl.constexpr = ds_s.shape[0] // 2
    if W < HALVES:
        await_ds_read(W, slot)
        ds_s.index(2 * W + slot).store(ds)
        fence_async_shared()
        barrier("arrive", 6 + slot, 128 + 128 * HALVES)


@gluon.jit
def await_ds(slot, HALVES: gl.constexpr):
    """dQ's warpgroup: the consumers have stored dS: a half each, or the first of them all of it."""
    barrier("sync", 6 + slot, 128 + 128 * HALVES)


@gluon.jit
def release_ds(slot, HALVES: gl.constexpr):
    """dQ's warpgroup: it has read the consumers' dS."""
    for half in gl.static_range(HALVES):
        barrier("arrive", 8 + slot * 2 + half, 256)


@gluon.jit
def await_other_consumer(W: gl.constexpr):
    """Consumer W at head_dim 256: the other one has come here too.

    9 and 11 are free where there is one half of dS. A barrier each, so that nobody but its owner waits at it: of two that wait at
    one barrier, each at its own copy of the instruction, compute-sanitizer's synccheck says that they diverge.
    """
    barrier("arrive", 11 - 2 * W, 256)
    barrier("sync", 9 + 2 * W, 256)


@gluon.jit
def await_ds_read(W: gl.constexpr, slot):
    """Consumer W: its dS of the step before last has been read."""
    barrier("sync", 8 + slot * 2 + W, 256)
