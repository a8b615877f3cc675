"""What flash_v3's two kernels share: words that Gluon lacks, and the dynamic schedule of a persistent grid.

Named barriers are an inline instruction; TMA's names changed from Triton 3.6 to 3.9 and are brought to one here.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
if hasattr(tma, "async_atomic_add"):
    tma_add = tma.async_atomic_add
else:  # Triton 3.6 and 3.7 have the instruction and no word for it
    from triton._C.libtriton import ir

    @builtin
    def tma_add(descriptor, coordinates, source, _semantic=None):
        """Adds shared memory to a block of the tensor."""
        coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, source.handle)


@builtin
def seen_as(memory, dtype, shape, layout, _semantic=None):
    """The same shared memory with another dtype, shape and layout. (Gluon's own word for it changed with Triton 3.9.)"""
    dtype, layout = _unwrap_if_constexpr(dtype), _unwrap_if_constexpr(layout)
    return _semantic.memdesc_reinterpret(memory, dtype, [_unwrap_if_constexpr(n) for n in shape], layout)


@gluon.constexpr_function
def _barrier_text(operation: str, number: object, threads: int) -> str:
    return f"bar.{operation} {number}, {threads}; mov.b32 $0, $1;"


@gluon.jit
def barrier(OPERATION: gl.constexpr, number, THREADS: gl.constexpr, WARPS: gl.constexpr = 4):
    """bar.sync or bar.arrive on a named barrier (5 to 15 are free) that takes THREADS in all, by WARPS warps' threads."""
    TEXT: gl.constexpr = _barrier_text(OPERATION, "$1", THREADS)
    numbers = gl.full([32 * WARPS], number, gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.inline_asm_elementwise(TEXT, "=r,r", [numbers], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def barrier_at(OPERATION: gl.constexpr, NUMBER: gl.constexpr):
    """`barrier` of two warpgroups with its number in the instruction."""
    TEXT: gl.constexpr = _barrier_text(OPERATION, NUMBER, 256)
    thread = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise(TEXT, "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)


# ---- blocks that take turns ----


@gluon.jit
def await_at_least(pointer, number):
    """Waits until another block has published `number` or more. What TMA adds from here on comes after all that it had added."""
    found = _acquire(pointer)
    while found < number:
        found = _acquire(pointer)
    thread = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise("fence.proxy.async; mov.b32 $0, $1;", "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _acquire(pointer):
    """A number of another block's; every lane has lane 0's."""
    TEXT: gl.constexpr = "{ .reg .b32 t; ld.acquire.gpu.global.b32 t, [$1]; shfl.sync.idx.b32 $0, t, 0, 31, -1; }"
    where = gl.full([1], pointer.to(gl.int64), gl.int64, gl.BlockedLayout([1], [32], [4], [0]))
    return gl.max(gl.inline_asm_elementwise(TEXT, "=r,l", [where], dtype=gl.int32, is_pure=False, pack=1), 0)


@gluon.constexpr_function
def _added_up_text(pending: int) -> str:
    return f"cp.async.bulk.wait_group {pending}; fence.proxy.async; bar.sync 5, 128; mov.b32 $0, $1;"


@gluon.jit
def publish(pointer, number, PENDING: gl.constexpr):
    """Raises a number that others await to this one, when all that TMA was asked to add by this warpgroup but the last PENDING
    times is in memory (tma.store_wait waits until it has been read)."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    thread = gl.arange(0, 128, layout=layout)
    WAIT: gl.constexpr = _added_up_text(PENDING)
    gl.inline_asm_elementwise(WAIT, "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)
    RAISE: gl.constexpr = (
        "{ .reg .pred first; setp.eq.u32 first, $1, 0; @first red.release.gpu.global.max.s32 [$2], $3; mov.b32 $0, $1; }"
    )
    where = gl.full([128], pointer.to(gl.int64), gl.int64, layout)
    numbers = gl.full([128], number, gl.int32, layout)
    gl.inline_asm_elementwise(RAISE, "=r,r,l,r", [thread, where, numbers], dtype=gl.int32, is_pure=False, pack=1)


# ---- scores ----


@gluon.jit
def interval(index, batch, n_own, n_other, behind, ahead, first_ptr, last_ptr):
    """First and last partner of each position: kernels.tile_ops.interval, with the positions aligned at their ends."""
    index = gl.minimum(index, n_own - 1)
    first = index * 0
    last = first + (n_other - 1)
    if behind is not None:
        first = gl.maximum(first, index + (n_other - n_own) - behind)
    if ahead is not None:
        last = gl.minimum(last, index + (n_other - n_own) + ahead)
    if first_ptr is not None:
        first = gl.maximum(first, gl.load(first_ptr + (batch.to(gl.int64) * n_own + index)))
        last = gl.minimum(last, gl.load(last_ptr + (batch.to(gl.int64) * n_own + index)))
    return first, last


@gluon.jit
def tanh_of_ratio(s, cap):
    """tanh(s / cap), as kernels.tile_ops.tanh has it for half precision."""
    return 1.0 - 2.0 / (1.0 + gl.exp2(s * (2.8853900817779268 / cap)))


@gluon.jit
def with_distance(s, slope, own, partners):
    """ALiBi: the scores less slope times the distance between the positions of rows and columns."""
    distance = own[:, None] - partners[None, :]
    return s - slope * gl.maximum(distance, -distance).to(gl.float32)


# ---- the schedule ----


@gluon.jit
def locate(tile, n_tile, n_head, heads_at_once, batch_heads):
    """Tile number -> (place, batch, head): heads in groups that share L2, and in a group place by place, over all its heads."""
    in_group = heads_at_once * n_tile
    group = tile // in_group
    rest = tile - group * in_group
    heads = gl.minimum(heads_at_once, batch_heads - group * heads_at_once)
    place = rest // heads
    head = group * heads_at_once + rest - place * heads
    return place, head // n_head, head % n_head


@gluon.jit
def draw(schedule, n, sizes, FROM_LAST: gl.constexpr, IN_ORDER: gl.constexpr = False):
    """For the producer: place, batch entry and head of the block's n-th tile, which is drawn from the counter and published to the
    consumers through a ring of two. The place is negative when there are no more. FROM_LAST: a head's last place comes first.

    The first tile is the block's own number, which costs no wait. Not so IN_ORDER, where blocks wait for earlier tiles: then no
    tile may belong to a block that has not started, and could not while others wait.
    """
    drawn, published, taken, counter = schedule
    n_head, _, _, n_tile, n_tiles, heads_at_once, batch_heads = sizes
    if IN_ORDER:
        tile = gl.atomic_add(counter, 1)
    else:
        tile = gl.program_id(0)
        if n > 0:
            tile = gl.num_programs(0) + gl.atomic_add(counter, 1)
    place, batch, head = locate(gl.minimum(tile, n_tiles - 1), n_tile, n_head, heads_at_once, batch_heads)
    if FROM_LAST:
        place = n_tile - 1 - place
    place = gl.where(tile < n_tiles, place, -1)
    slot = n % 2
    mbarrier.wait(taken.index(slot), ((n // 2) & 1) ^ 1)
    _put(drawn.index(slot * 3), place)
    _put(drawn.index(slot * 3 + 1), batch)
    _put(drawn.index(slot * 3 + 2), head)
    mbarrier.arrive(published.index(slot), count=1)
    return place, batch, head


@gluon.jit
def take(schedule, n):
    """For a consumer: place, batch entry and head of the n-th tile that the producer has published."""
    drawn, published, taken, _ = schedule
    slot = n % 2
    mbarrier.wait(published.index(slot), (n // 2) & 1)
    place = _get(drawn.index(slot * 3))
    batch = _get(drawn.index(slot * 3 + 1))
    head = _get(drawn.index(slot * 3 + 2))
    mbarrier.arrive(taken.index(slot), count=1)
    return gl.max(place, 0), gl.max(batch, 0), gl.max(head, 0)


@gluon.jit
def _put(drawn, number):
    drawn.store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def _get(drawn):
    """[1]: every thread reads the number; lane 0's copy, so that the compiler may take it for one number of the warp."""
    number = drawn.load(gl.BlockedLayout([1], [32], [4], [0]))
    TEXT: gl.constexpr = "shfl.sync.idx.b32 $0, $1, 0, 31, -1;"
    return gl.inline_asm_elementwise(TEXT, "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)
