"""The dynamic schedule of flash_v3's persistent grids: which tile of which head a block works on next.

A forward's tiles are of queries, a backward's are blocks of keys. The producer draws the next one's number from a counter in global
memory and publishes where that is, for the consumers to take, through a ring of two in shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def locate(number, sizes):
    """A tile's number in the grid -> (tile of its head, batch entry, head).

    Heads come in groups that share L2, and a group is walked tile by tile, each over all of its heads.
    """
    in_group = sizes.heads_at_once * sizes.n_tile
    group = number // in_group
    rest = number - group * in_group
    heads = gl.minimum(sizes.heads_at_once, sizes.batch_heads - group * sizes.heads_at_once)
    tile = rest // heads
    head = group * sizes.heads_at_once + rest - tile * heads
    return tile, head // sizes.heads, head % sizes.heads


@gluon.jit
def draw(schedule, n, sizes, FROM_LAST: gl.constexpr, IN_ORDER: gl.constexpr = False):
    """The producer draws the block's n-th tile and publishes it: tile, batch entry and head.

    The tile is negative when there are no more. FROM_LAST: a head's last tile comes first. A block's first tile is the block's own
    number, which costs no wait. Not so IN_ORDER, where blocks wait for earlier tiles: then no tile may belong to a block that has
    not started, and could not while others wait.
    """
    if IN_ORDER:
        number = gl.atomic_add(schedule.counter, 1)
    else:
        number = gl.program_id(0)
        if n > 0:
            number = gl.num_programs(0) + gl.atomic_add(schedule.counter, 1)
    tile, batch, head = locate(gl.minimum(number, sizes.n_tiles - 1), sizes)
    if FROM_LAST:
        tile = sizes.n_tile - 1 - tile
    tile = gl.where(number < sizes.n_tiles, tile, -1)
    slot = n % 2
    mbarrier.wait(schedule.taken.index(slot), ((n // 2) & 1) ^ 1)
    _put(schedule.drawn.index(slot * 3), tile)
    _put(schedule.drawn.index(slot * 3 + 1), batch)
    _put(schedule.drawn.index(slot * 3 + 2), head)
    mbarrier.arrive(schedule.published.index(slot), count=1)
    return tile, batch, head


@gluon.jit
def take(schedule, n):
    """A consumer takes the n-th tile that the producer has published: tile, batch entry and head."""
    slot = n % 2
    mbarrier.wait(schedule.published.index(slot), (n // 2) & 1)
    tile = _get(schedule.drawn.index(slot * 3))
    batch = _get(schedule.drawn.index(slot * 3 + 1))
    head = _get(schedule.drawn.index(slot * 3 + 2))
    mbarrier.arrive(schedule.taken.index(slot), count=1)
    return gl.max(tile, 0), gl.max(batch, 0), gl.max(head, 0)


@gluon.jit
def _put(drawn, number):
    drawn.store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def _get(drawn):
    """[1]: every thread reads the number; lane 0's copy, so that the compiler may take it for one number of the warp."""
    number = drawn.load(gl.BlockedLayout([1], [32], [4], [0]))
    TEXT: gl.constexpr = "shfl.sync.idx.b32 $0, $1, 0, 31, -1;"
    return gl.inline_asm_elementwise(TEXT, "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)
