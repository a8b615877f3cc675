"""What the Triton kernels do with one tile: where it lies, reading, writing, multiplying, and which queries see which keys.

Pointers to a tile are a 64-bit scalar base, moved from tile to tile, and small offsets inside a tile. The last dimension is
contiguous. BLOCK_D is head_dim rounded up to a power of two: the columns beyond HEAD_DIM are read as zero and never written.
"""

import triton
import triton.language as tl

from kernels.jit import INTERPRET

WIDEN = tl.constexpr(INTERPRET)  # the interpreter's dot takes bfloat16 for integers; the same values in float32 are right


@triton.jit
def tile_offsets(BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, stride, WIDE: tl.constexpr):
    """Offsets of a tile's elements from its first one; 64-bit where a stride asks for it."""
    rows = tl.arange(0, BLOCK)
    if WIDE:
        rows = rows.to(tl.int64)
    return rows[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def move(base, rows, stride):
    """A pointer moved down by so many rows, in 64 bits."""
    return base + tl.cast(rows, tl.int64) * stride


@triton.jit
def load_tile(base, offsets, rows, n_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """One tile; rows from n_rows on and columns from HEAD_DIM on come as zero."""
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
def key_range(first_row, seq_q, seq_k, IS_CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """For the queries of one tile: keys before the first result are seen by every row, keys from the second on by none."""
    whole = seq_k
    end = seq_k
    if IS_CAUSAL:
        diagonal = first_row + seq_k - seq_q
        whole = tl.minimum(whole, tl.maximum(diagonal + 1, 0))
        end = tl.minimum(end, tl.maximum(diagonal + BLOCK_Q, 0))
    return whole // BLOCK_K * BLOCK_K, end


@triton.jit
def sees(rows, cols, seq_q, seq_k, IS_CAUSAL: tl.constexpr):
    """Which queries see which keys, given as a column and a row vector of positions."""
    seen = cols < seq_k
    if IS_CAUSAL:
        seen = seen & (cols <= rows + (seq_k - seq_q))
    return seen
