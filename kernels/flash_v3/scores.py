"""Which scores there are, and what bends them: masks, softcap and ALiBi in flash_v3's kernels."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# ---- which partners a position has ----


class Span(NamedTuple):
    """Which of the other side's tiles, or blocks, some rows see; first and last of each."""

    lowest: Any  # that any of the rows sees
    highest: Any
    whole_from: Any  # that all of the rows see, every position of it
    whole_to: Any


@gluon.jit
def keys_seen_by(query, batch, asked, sizes):
    """First and last key that each query sees."""
    return interval(
        query, batch, sizes.seq_q, sizes.seq_k, asked.behind, asked.ahead, asked.first_ptr, asked.last_ptr
    )  # fmt: skip


@gluon.jit
def queries_that_see(key, batch, asked, sizes):
    """First and last query that sees each key."""
    return interval(
        key, batch, sizes.seq_k, sizes.seq_q, asked.ahead, asked.behind, asked.first_ptr, asked.last_ptr
    )  # fmt: skip


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


# ---- scores ----


class Rows(NamedTuple):
    """A consumer's 64 queries, as the rows of S have them."""

    positions: Any  # among the keys
    first: Any  # key that each sees
    last: Any
    slope: Any  # of their head, in units of the raw product, or None


@gluon.jit
def tanh_of_ratio(s, cap):
    """tanh(s / cap), as kernels.tile_ops.tanh has it for half precision."""
    return 1.0 - 2.0 / (1.0 + gl.exp2(s * (2.8853900817779268 / cap)))


@gluon.jit
def with_distance(s, slope, own, partners):
    """ALiBi: the scores less slope times the distance between the positions of rows and columns."""
    distance = own[:, None] - partners[None, :]
    return s - slope * gl.maximum(distance, -distance).to(gl.float32)


@gluon.jit
def softcap_and_alibi(s, cols, rows, cap):
    """Both in units of the raw product."""
    if cap is not None:
        s = cap * tanh_of_ratio(s, cap)
    if rows.slope is not None:
        s = with_distance(s, rows.slope, rows.positions, cols)
    return s


@gluon.jit
def mask(s, cols, rows, FROM: gl.constexpr):
    """Minus infinity where a row does not see a key. FROM: whether keys before its first may be there."""
    seen = cols[None, :] <= rows.last[:, None]
    if FROM:
        seen = seen & (cols[None, :] >= rows.first[:, None])
    return gl.where(seen, s, float("-inf"))
