"""What the warpgroups of flash_v3's backward agree on: a block's shape, which tiles it walks, and how dS is handed over."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .barriers import arrive_ds_full, wait_ds_empty
from .scores import Span, queries_that_see

QUERIES = gl.constexpr(64)  # of a tile
NEVER = gl.constexpr(2**30)  # a tile that does not come

# ---- shapes ----


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
def tiles_of(key, ROWS: gl.constexpr, batch, asked, sizes):
    """Span of the tiles of queries that see ROWS keys, from `key` on."""
    start, all_to = queries_that_see(key, batch, asked, sizes)
    all_from, end = queries_that_see(key + ROWS - 1, batch, asked, sizes)
    whole_from = gl.cdiv(all_from, QUERIES)
    whole_to = gl.maximum(all_to + 1, 0) // QUERIES - 1
    if all_to == sizes.seq_q - 1:  # a ragged last tile: its queries beyond the end have no probability anyway
        whole_to = gl.maximum(whole_to, (sizes.seq_q - 1) // QUERIES)
    if key + ROWS > sizes.seq_k:  # keys beyond the end must be masked everywhere
        whole_from = NEVER
    lowest = start // QUERIES
    highest = gl.maximum(end, -1) // QUERIES + gl.where(end < 0, -1, 0)
    return Span(lowest=lowest, highest=highest, whole_from=whole_from, whole_to=whole_to)


# ---- dS ----


@gluon.jit
def hand_over_ds(W: gl.constexpr, ds, slot, memory):
    """A consumer stores its dS, once dQ's warpgroup has read the one before in this buffer, and says so."""
    HALVES: gl.constexpr = memory.ds.shape[0] // 2
    if W < HALVES:
        wait_ds_empty(W, slot)
        memory.ds.index(2 * W + slot).store(ds)
        fence_async_shared()
        arrive_ds_full(slot, HALVES)
