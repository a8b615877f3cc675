"""The inline PTX of flash_v3's softmax, on a warp of numpy lanes: what of its arithmetic runs without a Hopper GPU."""

import numpy as np
import pytest
import torch
from triton.experimental.gluon import language as gl

from flash_ladder.kernels.flash_v3 import softmax
from tests.helpers import ptx

SCALE = np.float32(0.18)
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def spread(x: np.ndarray) -> np.ndarray:
    """[16, columns] of a warp's rows -> [elements, 32], as wgmma leaves it: two columns of row lane / 4, two of the row 8 on."""
    columns = x.shape[1]
    held = x.reshape(2, 8, columns // 8, 4, 2)  # row / 8, row % 8, column / 8, column % 8 / 2, column % 2
    return held.transpose(2, 0, 4, 1, 3).reshape(columns // 2, 32)


def of_rows(x: np.ndarray, elements: int) -> np.ndarray:
    """[16] -> [elements, 32]: every element of a thread gets its row's number."""
    return spread(np.repeat(x[:, None], 2 * elements, 1))


def by_lane(p: np.ndarray) -> np.ndarray:
    """[elements, 32] -> [elements, 32]: in every element of a row the sum of what its lane has of the row."""
    rows = p.reshape(-1, 2, 2, 32)
    return np.broadcast_to(rows.sum((0, 2), keepdims=True), rows.shape).reshape(p.shape).astype(np.float32)


def operands(constraints: str, started: list[np.ndarray], others: list[np.ndarray]) -> list[np.ndarray]:
    """Registers for all operands of a block, those that are tied to a result in its place, as a compiler lays them out."""
    kinds = constraints.split(",")
    results = [np.zeros(32, np.uint32 if kind == "=r" else np.float32) for kind in kinds if kind.startswith("=")]
    ties = [int(kind) for kind in kinds if kind.isdigit()]
    assert len(ties) == len(started) == len(set(ties)) and len(others) == kinds.count("f")
    for tie, value in zip(ties, started, strict=True):
        assert results[tie].dtype == value.dtype
        results[tie][:] = value
    return [*results, *(results[tie] for tie in ties), *others]


def pairs(p: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """[elements, 32] float32 -> [elements / 2, 32]: two neighbours in a number, the first in its lower half."""
    half = ptx.half_bits(p, dtype)
    return half[0::2] | half[1::2] << 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("above", [0.0, 60.0, 120.0, 3000.0])
@pytest.mark.parametrize("keys", [128, 64])
def test_p_is_made_again_where_a_score_is_far_above(keys, dtype, above):
    """One score of one row, `above` m. Up to 2^14 nothing changes; beyond, and if P is infinite, all is as the maxima have it."""
    generator, n = np.random.default_rng(0), keys // 2  # n: of a thread's scores
    scores, m = generator.normal(0, 8, (16, keys)).astype(np.float32), generator.normal(0, 8, 16).astype(np.float32)
    scores[11, 45] = m[11] + above
    with np.errstate(over="ignore"):
        p = np.exp2((scores - m[:, None]) * SCALE)
    started = [*pairs(spread(p), dtype), *of_rows(m, n), *by_lane(spread(p))]
    found = operands(softmax._in_range_operands(n), started, [*spread(scores), *np.full((n, 32), SCALE, np.float32)])
    ptx.run(softmax._in_range_text(n, DTYPES[dtype]), found)
    expected_m = m
    if p.reshape(16, -1, 4, 2).sum((1, 3)).max() > 2**14:
        expected_m = np.maximum(m, scores.max(1))
        p = np.exp2((scores - expected_m[:, None]) * SCALE)
    assert (expected_m is m) == (above < 14 / SCALE)
    for row in (0, 2):  # the elements that count: the first of each of a thread's two rows
        np.testing.assert_array_equal(found[n + row], of_rows(expected_m, n)[row])
        np.testing.assert_allclose(found[2 * n + row], by_lane(spread(p))[row], rtol=1e-5)
    got = np.stack(found[0:n:2]).astype(np.uint32)
    for shift, neighbours in ((0, spread(p)[0::2]), (16, spread(p)[1::2])):
        bits = torch.from_numpy((got >> shift & 0xFFFF).astype(np.uint16).view(np.int16))
        np.testing.assert_allclose(bits.view(dtype).float().numpy(), neighbours, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_rows_without_a_key_stay_without_one():
    """m as it starts, scores of minus infinity: no sum, and so nothing to make again. NaN is none either."""
    keys, n = 128, 64
    scores, m = np.full((16, keys), -np.inf, np.float32), np.full(16, -(2.0**100), np.float32)
    scores[3] = np.nan
    p = np.zeros((16, keys), np.float32)
    p[3] = np.nan
    started = [*pairs(spread(p), torch.bfloat16), *of_rows(m, n), *by_lane(spread(p))]
    found = operands(softmax._in_range_operands(n), started, [*spread(scores), *np.full((n, 32), SCALE, np.float32)])
    before = [x.copy() for x in found]
    ptx.run(softmax._in_range_text(n, gl.bfloat16), found)
    for a, b in zip(before, found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("moved", [(), (2,), (9,), (0, 15)])
def test_o_is_rescaled_where_m_has_moved(head_dim, moved):
    """All of a row's elements by its factor, whichever of the warp's rows it is."""
    n = head_dim // 2
    acc, factor = np.random.default_rng(0).normal(size=(16, head_dim)).astype(np.float32), np.ones(16, np.float32)
    factor[list(moved)] = 0.25
    found = operands(softmax._rescaled_operands(n), list(spread(acc)), list(of_rows(factor, n)))
    ptx.run(softmax._rescaled_text(n), found)
    np.testing.assert_array_equal(np.stack(found[:n]), spread(acc * factor[:, None]))
