"""What the Triton kernels do with one tile: they find, load, store and multiply it, mask its scores, and apply softcap and ALiBi.

A pointer to a tile is a 64-bit scalar base, moved from tile to tile, plus small offsets inside the tile. The last dimension is
contiguous. BLOCK_D is head_dim rounded up to a power of two: the columns beyond HEAD_DIM are read as zero and never written.
"""

import math

import triton
import triton.language as tl

from .jit import INTERPRET

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
# The initial row maximum. It is below any score, and its product with any scale in use is finite. -inf would give NaN in rows that
# have seen nothing yet.
LOWEST = tl.constexpr(-(2.0**100))
# Which tiles of a loop are masked: none, all, or those that a bound cuts.
NONE, ALL, SOME = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
WIDEN = tl.constexpr(INTERPRET)  # the interpreter's dot misreads bfloat16 as integers; float32 holds the same values


@triton.jit
def own_tile(n_tile, n_head, FLAT: tl.constexpr):
    """Tile, head and batch entry of this program of `kernels.launch.grid`: the tiles of a head are neighbours."""
    if FLAT:
        tile = tl.program_id(0) % n_tile
        head = tl.program_id(0) // n_tile % n_head
        batch = tl.program_id(0) // n_tile // n_head
    else:
        tile = tl.program_id(0)
        head = tl.program_id(1)
        batch = tl.program_id(2)
    return tile, head.to(tl.int64), batch.to(tl.int64)


@triton.jit
def tile_offsets(BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, stride, WIDE: tl.constexpr):
    """Offsets of a tile's elements from its first one, in 64 bits where a stride needs them (WIDE)."""
    rows = tl.arange(0, BLOCK)
    if WIDE:
        rows = rows.to(tl.int64)
    return rows[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def move(base, rows, stride):
    """`base`, moved down by `rows` rows in 64-bit arithmetic."""
    return base + tl.cast(rows, tl.int64) * stride


@triton.jit
def load_tile(base, offsets, rows, n_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """One tile; rows from n_rows on and columns from HEAD_DIM on are read as zero."""
    if BLOCK_D > HEAD_DIM:
        inside = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
        if CHECK_ROWS:
            inside = inside & (rows[:, None] < n_rows)
        return tl.load(base + offsets, mask=inside, other=0.0)
    if CHECK_ROWS:
        return tl.load(base + offsets, mask=rows[:, None] < n_rows, other=0.0)
    return tl.load(base + offsets)


@triton.jit
def store_tile(base, offsets, tile, rows, n_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes a tile's rows before n_rows and columns before HEAD_DIM, in the pointer's dtype."""
    inside = (rows[:, None] < n_rows) & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    tl.store(base + offsets, round_to(tile, base.dtype.element_ty), mask=inside)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """The matrix product a b + acc, accumulated in float32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Rounds to nearest even."""
    if WIDEN and dtype == tl.bfloat16:  # the interpreter cuts the low bits off; a GPU rounds to nearest even
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def interval(index, n_own, n_other, shift, behind, ahead, FIRST, LAST):
    """First and last partner of each position: the keys of a query or the queries of a key (kernels.bounds, inside a kernel).

    A position stands at index + shift among its n_other partners. It sees those from `behind` before it to `ahead` after it (None:
    no limit). Where FIRST and LAST hold each document's bounds, it sees its own document only. first > last: it sees none.
    Positions beyond the end count as the last one. Both bounds grow with the index.
    """
    index = tl.minimum(index, n_own - 1)
    first = index * 0
    last = first + (n_other - 1)
    if behind is not None:
        first = tl.maximum(first, index + shift - behind)
    if ahead is not None:
        last = tl.minimum(last, index + shift + ahead)
    if FIRST is not None:
        first = tl.maximum(first, tl.load(FIRST + index))
        last = tl.minimum(last, tl.load(LAST + index))
    return first, last


@triton.jit
def within(partners, first, last, FROM: tl.constexpr, TO: tl.constexpr):
    """Which partners (a row vector) lie in each interval; FROM and TO say which of its ends to compare."""
    if FROM and TO:
        return (partners >= first[:, None]) & (partners <= last[:, None])
    elif FROM:
        return partners >= first[:, None]
    else:
        return partners <= last[:, None]


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """The hyperbolic tangent, from the base-2 exponential; good to 1e-7, and for small x too where PRECISE."""
    y = 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))
    if PRECISE:  # near zero the line above loses digits, and a series loses none
        z = x * x
        series = x * (1.0 + z * (-0.33333333333 + z * (0.13333333333 + z * (-0.05396825397 + z * 0.02186948854))))
        y = tl.where(z < 0.0625, series, y)
    return y


@triton.jit
def with_distance(s, slope, queries, keys):
    """ALiBi: the scores less slope times the distance between query and key."""
    return s - slope * tl.abs(queries - keys).to(tl.float32)
