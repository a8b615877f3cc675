"""The state of flash_v3's kernels, by name: what each is given, what it keeps in shared memory, and who tells whom.

Each group is a NamedTuple, which Gluon takes on Triton 3.6 to 3.9. (Its aggregates have a private name before 3.9, and no room for
an argument that is None.) Two rules come with that:

    A kernel builds them by keyword. The key of Triton's cache holds the source of functions and not of these classes, so the order
    of their fields must not matter there.

    Constants travel beside the state, as one constexpr. In a tuple that is assigned to a name, Gluon makes numbers of them.
"""

from typing import Any, NamedTuple

# ---- both kernels ----


class KernelAsked(NamedTuple):
    """What is asked of attention, as the kernels have it; None drops the code that would look at it."""

    first_ptr: Any  # pointers to int32 [B, S]: first and last position of each position's document
    last_ptr: Any
    slopes_ptr: Any  # a pointer to float32 [Hq]
    scale: Any
    behind: Any  # a query sees the keys from `behind` before its own position to `ahead` after it
    ahead: Any
    cap: Any  # softcap / scale


class Sizes(NamedTuple):
    """Sizes of the problem, int32: arguments of both kernels, in this order."""

    heads: Any  # whose tiles are drawn: n_head query heads in the forward, n_kv_head key/value heads in the backward
    seq_q: Any
    seq_k: Any
    n_tile: Any  # of one head
    n_tiles: Any  # of all heads and batch entries
    heads_at_once: Any  # of all batch entries: their keys and values, or queries, share L2
    batch_heads: Any  # batch entries times heads


class Schedule(NamedTuple):
    """What passes tiles from the producer to the consumers."""

    drawn: Any  # int32 [6, 1]: tile, batch entry and head, in each of two slots
    published: Any  # mbarriers [2, 1]: the producer arrives, the consumers wait
    taken: Any  # mbarriers [2, 1]: each consumer arrives, the producer waits
    counter: Any  # a pointer to int32: how many have been drawn


# ---- forward ----


class ForwardTensors(NamedTuple):
    """Descriptors of what TMA moves, and a pointer."""

    q: Any
    k: Any
    v: Any
    o: Any
    lse_ptr: Any


class ForwardMemory(NamedTuple):
    """Shared memory, by what is waited for as one."""

    q: Any  # [WARPGROUPS, 1, 1, 64, HEAD_DIM]
    o: Any  # the same; at head_dim 256 in q's place, with as many columns as fit
    k: Any  # [BUFFERS, 1, 1, BLOCK_K, HEAD_DIM]
    v: Any


class ForwardRings(NamedTuple):
    """mbarriers. Full: TMA arrives with its bytes, and readers wait. Empty: the readers arrive, and the producer waits."""

    q_full: Any  # [WARPGROUPS, 1], one for each consumer
    q_empty: Any
    k_full: Any  # [BUFFERS, 1]; all consumers wait, and all arrive at the empty ones
    k_empty: Any
    v_full: Any
    v_empty: Any


class ForwardConstants(NamedTuple):
    """What the forward's kernel has compiled in: the last of its arguments, in this order."""

    GROUP: Any  # query heads of a key/value head
    WARPGROUPS: Any  # consumers, 64 queries each
    BLOCK_K: Any  # keys of a block
    HEAD_DIM: Any
    BUFFERS: Any  # blocks of keys, and of values, in shared memory
    Q_IN_REGISTERS: Any
    BETWEEN: Any  # whether more blocks than the last that a tile sees may be cut at their end
    HALF: Any  # whether the first of two warpgroups sees the first half of the last block
    CONSUMER_REGISTERS: Any  # of a thread
    PRODUCER_REGISTERS: Any


class ForwardState(NamedTuple):
    """All that the warpgroups are given."""

    tensors: ForwardTensors
    asked: KernelAsked
    sizes: Sizes
    memory: ForwardMemory
    rings: ForwardRings
    schedule: Schedule


# ---- backward ----


class BackwardTensors(NamedTuple):
    """Descriptors of what TMA moves."""

    q: Any
    do: Any
    k: Any
    v: Any
    stats: Any  # a row for each tile of queries: log-sum-exp in base 2, delta
    dq: Any  # the sum, float32
    dk: Any
    dv: Any


class BackwardMemory(NamedTuple):
    """Shared memory, by what is waited for as one; PARTS and WIDTH are a tile's parts by columns, HALVES a block's by keys."""

    q: Any  # [2 PARTS, 1, 1, QUERIES, WIDTH]
    do: Any
    k: Any  # [2 BUFFERS, 1, 1, 64, WIDTH]: halves of a block by keys or, at head_dim 256, by columns
    v: Any
    stats: Any  # float32 [2, 1, 2 QUERIES]
    ds: Any  # [2 HALVES, 64, QUERIES]: consumer 0's two buffers, then consumer 1's
    dq: Any  # float32 [2 / PARTS, 2 QUERIES, 32]


class BackwardRings(NamedTuple):
    """mbarriers. Full: TMA arrives with its bytes, and readers wait. Empty: the readers arrive, and the producer waits."""

    kv_full: Any  # [2 BUFFERS, 1]: K, then V, of each block; all consumers and dQ's warpgroup (K alone) wait
    kv_empty: Any  # [BUFFERS, 1]: both consumers and dQ's warpgroup arrive
    q_full: Any  # [2, 1]: Q and its statistics; named barriers (TILE_EMPTY) say when they are read
    do_full: Any  # [2, 1]


class BackwardConstants(NamedTuple):
    """What the backward's kernel has compiled in: the last of its arguments, in this order."""

    GROUP: Any  # query heads of a key/value head
    HEAD_DIM: Any
    BUFFERS: Any  # blocks of keys and values in shared memory
    SWIZZLE: Any  # of dS in shared memory, in bytes
    FROM: Any  # whether a mask cuts where the queries that see a key begin
    TO: Any  # the same of where they end
    DETERMINISTIC: Any


class BackwardState(NamedTuple):
    """All that the warpgroups are given."""

    tensors: BackwardTensors
    asked: KernelAsked
    sizes: Sizes
    memory: BackwardMemory
    rings: BackwardRings
    schedule: Schedule
