"""The softmax of flash_v3's forward: P against a maximum that lags behind.

A running maximum m only has to keep P in range: any other value would cancel in O and lse. So past a tile's first block no maximum
is taken. P is made with the m there is, and its row sums, which are needed anyway, tell whether a score was far above m. Only then,
in a branch, the kernel takes the rows' maxima and makes P again. The rescaling of O is behind a branch too, since m seldom moves.
(FlashAttention-4 leaves out rescaling for small moves of m; here the maximum itself is left out as well.)

A wgmma leaves S [64, keys] so that a thread holds two columns of one row and two of another in turns, and four lanes share a row.
Everything stays as the threads have it. What belongs to rows is [64, 4], a column for each of the four lanes: m has equal copies
there, and l a part of the sum in each. P is [64, keys / 8, 4] int32, pairs of half-precision numbers. So nothing moves between
lanes until a tile's end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..tile_ops import LOWEST

# ---- P ----


@gluon.jit
def softmax_of_first(s, qk_scale, dtype: gl.constexpr):
    """P of a tile's first block of scores, the rows' maxima (of a row without keys LOWEST) and sums."""
    s = s.reshape([64, s.shape[1] // 8, 4, 2])
    lanes: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, s.type.layout))
    high = gl.maximum(gl.max(gl.max(gl.max(s, 3), 1), 1), LOWEST)
    m = gl.convert_layout(high, gl.SliceLayout(1, lanes))[:, None] + gl.full([64, 4], 0.0, gl.float32, lanes)
    p = gl.exp2(s * qk_scale - (m * qk_scale)[:, None, :, None])
    low, high = gl.split(p.to(dtype).to(gl.int16, bitcast=True))
    return (low.to(gl.int32) & 0xFFFF) | (high.to(gl.int32) << 16), m, gl.sum(gl.sum(p, 3), 1)


@gluon.jit
def softmax_of_next(s, m, l, qk_scale, dtype: gl.constexpr):
    """P of a further block, m and l with it, and the factor that O so far must be multiplied by."""
    KEYS: gl.constexpr = s.shape[1]
    TEXT: gl.constexpr = _in_range_text(KEYS // 2, dtype)
    OPERANDS: gl.constexpr = _in_range_operands(KEYS // 2)
    s = s.reshape([64, KEYS // 8, 4, 2])
    lanes: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, s.type.layout))
    old_m = gl.convert_layout(m, lanes)
    p = gl.exp2(s * qk_scale - (old_m * qk_scale)[:, None, :, None])
    sums = gl.sum(gl.sum(p, 3), 1)
    each = gl.full(s.shape, 0.0, gl.float32, s.type.layout)  # to give every element its row's numbers
    pairs, new_m, sums = gl.inline_asm_elementwise(
        TEXT, OPERANDS, [p.to(dtype), each + old_m[:, None, :, None], each + sums[:, None, :, None], s, each + qk_scale],
        dtype=(gl.int32, gl.float32, gl.float32), is_pure=False, pack=KEYS // 2,
    )  # fmt: skip
    pairs, _ = gl.split(pairs)
    new_m = gl.convert_layout(_of_rows(new_m), m.type.layout)
    rescale = gl.exp2((m - new_m) * qk_scale)  # of the difference, as in flash_v2
    return pairs, new_m, l * rescale + gl.convert_layout(_of_rows(sums), m.type.layout), rescale


@gluon.jit
def _of_rows(x):
    """[64, 8 or 16, 4, 2], of which a thread's elements in a row are equal or left out but the first -> [64, 4]."""
    GROUPS: gl.constexpr = x.shape[1]
    x, _ = gl.split(x)
    x = x.permute((0, 2, 1))
    if GROUPS == 16:
        x, _ = gl.split(x.reshape([64, 4, 8, 2]))
    x, _ = gl.split(x.reshape([64, 4, 4, 2]))
    x, _ = gl.split(x.reshape([64, 4, 2, 2]))
    x, _ = gl.split(x)
    return x


@gluon.constexpr_function
def _in_range_text(n: int, dtype: object) -> str:
    """PTX on a thread's n scores: if the sum of P in any of the warp's rows is over 2^14, it takes the rows' maxima and makes P and
    its sums again.

    Operands: n / 2 pairs of P, each followed by a number that is not used; n of m and n of the sums, of which the first of each of
    the two rows count; what these hold before (`_in_range_operands`); n scores; and the scale.
    """
    pairs = [f"${2 * i}" for i in range(n // 2)]
    m, sums = [f"${n}", f"${n + 2}"], [f"${2 * n}", f"${2 * n + 2}"]
    scores, scale = [f"${5 * n + n // 2 + i}" for i in range(n)], f"${6 * n + n // 2}"
    half = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    lines = [
        "{ .reg .pred over; .reg .f32 high0, high1, other, shift0, shift1, left, right;",
        f"setp.gt.f32 over, {sums[0]}, 0f46800000; setp.gt.or.f32 over, {sums[1]}, 0f46800000, over;",
        "vote.sync.any.pred over, over, -1; @!over bra DONE;",
        f"mov.f32 high0, {m[0]}; mov.f32 high1, {m[1]};",
    ]
    lines += [f"max.f32 high{i // 2 % 2}, high{i // 2 % 2}, {scores[i]};" for i in range(n)]
    for row in range(2):
        lines += [f"shfl.sync.bfly.b32 other, high{row}, {lane}, 31, -1; max.f32 high{row}, high{row}, other;" for lane in (1, 2)]
        lines += [f"mov.f32 {m[row]}, high{row}; mul.f32 shift{row}, high{row}, {scale}; neg.f32 shift{row}, shift{row};"]
        lines += [f"mov.f32 {sums[row]}, 0f00000000;"]
    for i in range(n // 2):
        row = i % 2
        for name, score in (("left", scores[2 * i]), ("right", scores[2 * i + 1])):
            lines += [f"fma.rn.f32 {name}, {score}, {scale}, shift{row}; ex2.approx.ftz.f32 {name}, {name};"]
            lines += [f"add.f32 {sums[row]}, {sums[row]}, {name};"]
        lines += [f"cvt.rn.{half}.f32 {pairs[i]}, right, left;"]
    return " ".join([*lines, "DONE: }"])


@gluon.constexpr_function
def _in_range_operands(n: int) -> str:
    """3 n results: the pairs, m and the sums start as the first inputs."""
    begun = [str(2 * i) for i in range(n // 2)] + [str(i) for i in range(n, 3 * n)]
    return ",".join(["=r"] * n + ["=f"] * (2 * n) + begun + ["f"] * (2 * n))


@gluon.jit
def pad_keys(p):
    """P of half a block's keys, padded with zeros to the whole block."""
    both = gl.join(p, gl.full(p.shape, 0, gl.int32, p.type.layout))
    return both.permute((0, 3, 1, 2)).reshape([64, 2 * p.shape[1], 4])


@gluon.jit
def as_operand(p, dtype: gl.constexpr, layout: gl.constexpr):
    """P [64, keys] as a product takes it."""
    pair = gl.join(p.to(gl.int16), (p >> 16).to(gl.int16)).to(dtype, bitcast=True)
    return gl.convert_layout(pair.reshape([64, 8 * p.shape[1]]), layout)


# ---- O ----


@gluon.jit
def rescaled(acc, rescale):
    """acc [64, head_dim] times its rows' factors. A warp whose factors are all one does nothing."""
    HEAD_DIM: gl.constexpr = acc.shape[1]
    TEXT: gl.constexpr = _rescaled_text(HEAD_DIM // 2)
    OPERANDS: gl.constexpr = _rescaled_operands(HEAD_DIM // 2)
    x = acc.reshape([64, HEAD_DIM // 8, 4, 2])
    lanes: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, x.type.layout))
    factors = gl.convert_layout(rescale, lanes)[:, None, :, None]
    x = gl.inline_asm_elementwise(TEXT, OPERANDS, [x, factors], dtype=gl.float32, is_pure=False, pack=HEAD_DIM // 2)
    return gl.convert_layout(x.reshape([64, HEAD_DIM]), acc.type.layout, assert_trivial=True)


@gluon.constexpr_function
def _rescaled_text(n: int) -> str:
    """PTX on all of a thread's n elements. From $2n on come as many factors: the first row's first, the other row's two further."""
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n))
    return (
        f"{{ .reg .pred moved; setp.neu.f32 moved, ${2 * n}, 0f3F800000; setp.neu.or.f32 moved, ${2 * n + 2}, 0f3F800000, moved; "
        f"vote.sync.any.pred moved, moved, -1; @!moved bra DONE; {products} DONE: }}"
    )


@gluon.constexpr_function
def _rescaled_operands(n: int) -> str:
    """n results, in the registers of the n elements that come in, and n factors."""
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)
