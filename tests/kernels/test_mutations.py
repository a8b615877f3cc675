"""Tests must be able to fail: each fault below is planted in a copy of a rung, and the check that passes without it must go red."""

import pytest
import torch

from flash_ladder.kernels import attention
from tests.helpers.mutants import Fault, planted
from tests.helpers.reference import TRITON_RUNGS, check, documents, make_case, slopes

pytestmark = pytest.mark.filterwarnings("ignore")

FP32 = torch.float32


def poisoned_padding(backend: str) -> None:
    """Keys and values that lie between NaN."""
    key, value = (torch.full((1, 1, 80, 16), float("nan"))[:, :, 5:75].copy_(torch.randn(70, 16)) for _ in range(2))
    output = attention(torch.randn(1, 1, 40, 16), key, value, backend=backend)
    assert not output.isnan().any(), "NaN in the result"


# Each crosses tiles both ways (64 queries by 32 keys, 32 by 64 for dk and dv), ends raggedly, and has something of its own.
CHECKS = {
    "causal, heads in groups": lambda b: check(make_case(1, 4, 2, 70, 100, 24, FP32), b, is_causal=True),
    "causal, blind rows": lambda b: check(make_case(1, 1, 1, 100, 40, 16, FP32), b, is_causal=True),
    "full": lambda b: check(make_case(2, 1, 1, 40, 70, 16, FP32), b),
    "window": lambda b: check(make_case(1, 1, 1, 100, 130, 16, FP32), b, window_size=40),
    "causal window": lambda b: check(make_case(1, 1, 1, 130, 130, 16, FP32), b, is_causal=True, window_size=40),
    "documents": lambda b: check(make_case(2, 1, 1, 100, 100, 16, FP32), b, document_ids=documents(100, (20, 70), (10, 50))),
    "softcap": lambda b: check(make_case(1, 1, 1, 40, 70, 16, FP32), b, softcap=1.0),
    "alibi, heads in groups": lambda b: check(make_case(1, 4, 2, 33, 40, 16, FP32), b, alibi_slopes=slopes(4)),
    "poisoned padding": poisoned_padding,
}


CAUSAL, BLIND, FULL, WINDOW, CAUSAL_WINDOW, DOCUMENTS, SOFTCAP, ALIBI, PADDING = CHECKS

BACKWARD = "flash_v2_backward"

# What both rungs are made of; planted under flash_v2.
SHARED = {
    "causal mask one to the right": Fault(CAUSAL, "tile_ops", "interval", "shift + ahead)", "shift + ahead + 1)"),
    "causal mask one to the left": Fault(CAUSAL, "tile_ops", "interval", "shift + ahead)", "shift + ahead - 1)"),
    "causal mask aligned top-left": Fault(CAUSAL, "tile_ops", "interval", "index + shift + ahead)", "index + ahead)"),
    "window one too long": Fault(WINDOW, "tile_ops", "interval", "shift - behind)", "shift - behind - 1)"),
    "window one too short": Fault(WINDOW, "tile_ops", "interval", "shift - behind)", "shift - behind + 1)"),
    "window aligned top-left": Fault(WINDOW, "tile_ops", "interval", "index + shift - behind)", "index - behind)"),
    "keys beyond the end seen": Fault(FULL, "tile_ops", "interval", "(n_other - 1)", "n_other"),
    "positions beyond the end not clipped": Fault(DOCUMENTS, "tile_ops", "interval", "tl.minimum(index, n_own - 1)", "index"),
    "document's start ignored": Fault(DOCUMENTS, "tile_ops", "interval", "tl.maximum(first, tl.load(FIRST + index))", "first"),
    "document's end ignored": Fault(DOCUMENTS, "tile_ops", "interval", "tl.minimum(last, tl.load(LAST + index))", "last"),
    "first key of an interval hidden": Fault(WINDOW, "tile_ops", "within", "partners >= first", "partners > first"),
    "last key of an interval hidden": Fault(CAUSAL, "tile_ops", "within", "partners <= last", "partners < last"),
    "padded columns read": Fault(CAUSAL, "tile_ops", "load_tile", "[None, :] < HEAD_DIM", "[None, :] < BLOCK_D"),
    "rows beyond the end read": Fault(PADDING, "tile_ops", "load_tile", "rows[:, None] < n_rows", "rows[:, None] <= n_rows"),
    "tanh of half the score": Fault(SOFTCAP, "tile_ops", "tanh", "2.8853900817779268", "1.4426950408889634"),
    "tanh's series with a wrong sign": Fault(SOFTCAP, "tile_ops", "tanh", "z * (-0.33333333333", "z * (0.33333333333"),
    "distance without its sign dropped": Fault(ALIBI, "tile_ops", "with_distance", "tl.abs(queries - keys)", "(queries - keys)"),
    "cap in units of the scaled score": Fault(SOFTCAP, "asked", "numbers_for_kernels", "softcap / asked.scale", "softcap"),
    "window's length for its reach": Fault(WINDOW, "asked", "numbers_for_kernels", "seq_q + seq_k) - 1", "seq_q + seq_k)"),
    "causality forgotten in a window": Fault(
        CAUSAL_WINDOW, "asked", "numbers_for_kernels", "0 if asked.is_causal else reach", "reach"
    ),
    "document's end one too far": Fault(DOCUMENTS, "documents", "bounds_kernel", "after - 1)", "after)"),
    "document's start one too late": Fault(DOCUMENTS, "documents", "bounds_kernel", "before + 1,", "before + 2,"),
}  # fmt: skip

V2 = {
    "output not rescaled": Fault(CAUSAL, "flash_v2", "_forward_mainloop", "acc * rescale[:, None]", "acc"),
    "row sum not rescaled": Fault(CAUSAL, "flash_v2", "_forward_mainloop", "l * rescale", "l"),
    "stale maximum": Fault(CAUSAL, "flash_v2", "_forward_mainloop", "m = m_new", "m = tl.where(first_col == 0, m_new, m)"),
    "softcap not applied": Fault(SOFTCAP, "flash_v2", "_forward_mainloop", "s = cap * tanh", "bent = cap * tanh"),
    "window's start not masked": Fault(WINDOW, "flash_v2", "_forward_mainloop", "first_col < all_from or ", ""),
    "window's end not masked": Fault(WINDOW, "flash_v2", "_forward_mainloop", " or first_col + BLOCK_K > all_to + 1", ""),
    "one unmasked tile too many": Fault(CAUSAL, "flash_v2", "_forward_kernel", "(all_to + 1, 0)", "(all_to + BLOCK_K, 0)"),
    "tile on the diagonal dropped": Fault(CAUSAL, "flash_v2", "_forward_kernel", "last, cut, end + 1", "last, cut, cut"),
    "window's first tile dropped": Fault(
        WINDOW, "flash_v2", "_forward_kernel", "start // BLOCK_K * BLOCK_K,", "(start // BLOCK_K + 1) * BLOCK_K,"
    ),
    "cut before the first key": Fault(BLIND, "flash_v2", "_forward_kernel", "tl.maximum(all_to + 1, 0)", "(all_to + 1)"),
    "blind rows divided by zero": Fault(BLIND, "flash_v2", "_forward_kernel", "tl.where(blind, 1.0, l)", "l"),
    "lse in base 2": Fault(CAUSAL, "flash_v2", "_forward_kernel", "tl.log2(l)) * LN2", "tl.log2(l))"),
    "lse without the maximum": Fault(CAUSAL, "flash_v2", "_forward_kernel", "(m * qk_scale + tl.log2(l))", "tl.log2(l)"),
    "wrong key/value head": Fault(CAUSAL, "flash_v2", "_forward_kernel", "head // GROUP * stride_kh", "head % GROUP * stride_kh"),
    "documents of another batch entry": Fault(DOCUMENTS, "flash_v2", "_forward_kernel", "FIRST += batch * seq_q", "FIRST += 0"),
    "slope of another head": Fault(ALIBI, "flash_v2", "_forward_kernel", "SLOPES + head", "SLOPES + head // GROUP"),
    "slope in units of the scaled score": Fault(ALIBI, "flash_v2", "_forward_kernel", "SLOPES + head) / scale", "SLOPES + head)"),
    "distance aligned top-left": Fault(ALIBI, "flash_v2", "_forward_kernel", "= rows + (seq_k - seq_q)", "= rows"),
    "no scale in dq": Fault(CAUSAL, BACKWARD, "dq_kernel", "dq * scale, rows", "dq, rows"),
    "gradient of lse dropped": Fault(CAUSAL, BACKWARD, "dq_kernel", "delta -= tl.load(DLSE", "delta -= 0.0 * tl.load(DLSE"),
    "gradient of lse with the wrong sign": Fault(CAUSAL, BACKWARD, "dq_kernel", "delta -= tl.load", "delta += tl.load"),
    "delta dropped in dq": Fault(CAUSAL, BACKWARD, "_dq_mainloop", "(dp - delta[:, None])", "dp"),
    "softcap's derivative dropped in dq": Fault(SOFTCAP, BACKWARD, "_dq_mainloop", "ds * (1.0 - bent * bent)", "ds * 1.0"),
    "distance dropped in dq": Fault(ALIBI, BACKWARD, "_dq_mainloop", "s = with_distance", "_ = with_distance"),
    "window's start not masked in dq": Fault(WINDOW, BACKWARD, "_dq_mainloop", "first_col < all_from or ", ""),
    "tile on the diagonal dropped in dq": Fault(CAUSAL, BACKWARD, "dq_kernel", "last, cut, end + 1", "last, cut, cut"),
    "documents of another batch entry in dq": Fault(DOCUMENTS, BACKWARD, "dq_kernel", "LAST += batch * seq_q", "LAST += 0"),
    "no scale in dk": Fault(CAUSAL, BACKWARD, "dkdv_kernel", "dk * scale, cols", "dk, cols"),
    "delta dropped in dk": Fault(CAUSAL, BACKWARD, "_dkdv_mainloop", "(dp - delta[None, :])", "dp"),
    "softcap's derivative dropped in dk": Fault(SOFTCAP, BACKWARD, "_dkdv_mainloop", "(1.0 - bent * bent)", "(1.0 - 0.0 * bent)"),
    "distance aligned top-left in dk": Fault(ALIBI, BACKWARD, "_dkdv_mainloop", "rows[None, :] + shift", "rows[None, :]"),
    "slope of the key/value head in dk": Fault(ALIBI, BACKWARD, "dkdv_kernel", "SLOPES + head", "SLOPES + kv_head"),
    "group of one in dk": Fault(CAUSAL, BACKWARD, "dkdv_kernel", "range(GROUP)", "range(1)"),
    "heads swapped in dk": Fault(CAUSAL, BACKWARD, "dkdv_kernel", "kv_head * GROUP + member", "member * n_kv_head + kv_head"),
    "first tile of queries skipped in dk": Fault(
        CAUSAL, BACKWARD, "dkdv_kernel", "start // BLOCK_Q * BLOCK_Q", "(start // BLOCK_Q + 1) * BLOCK_Q"
    ),
    "window's end not masked in dk": Fault(WINDOW, BACKWARD, "_dkdv_mainloop", " or first_row + BLOCK_Q > all_to + 1", ""),
    "documents of another batch entry in dk": Fault(DOCUMENTS, BACKWARD, "dkdv_kernel", "FIRST += batch * seq_k", "FIRST += 0"),
    "ragged queries counted": Fault(CAUSAL, "flash_v2", "backward", "RAGGED=seq_q % tile.block_q != 0", "RAGGED=False"),
    "head for tile": Fault(CAUSAL_WINDOW, "tile_ops", "own_tile", "tile = tl.program_id(0)\n", "tile = tl.program_id(1)\n"),
    "head for batch entry": Fault(FULL, "tile_ops", "own_tile", "batch = tl.program_id(2)", "batch = tl.program_id(1)"),
    "tile missing in the grid": Fault(CAUSAL, "flash_v2", "backward", "-(-seq_k // tile.block_k)", "seq_k // tile.block_k"),
}  # fmt: skip

V1 = {
    "output not rescaled": Fault(CAUSAL, "flash_v1", "_forward_kernel", "o * l_old[:, None]", "o"),
    "row sum not shifted to the new maximum": Fault(CAUSAL, "flash_v1", "_forward_kernel", "tl.exp2(m - finite) * l", "l"),
    "output not divided": Fault(CAUSAL, "flash_v1", "_forward_kernel", " / tl.where(l_new > 0, l_new, 1.0)[:, None]", ""),
    "rows that saw nothing yet divided by zero": Fault(
        BLIND, "flash_v1", "_forward_kernel", "tl.where(l_new > 0, l_new, 1.0)", "l_new"
    ),
    "stale maximum": Fault(CAUSAL, "flash_v1", "_forward_kernel", "M + per_head + rows, m_new", "M + per_head + rows, m"),
    "stale row sum": Fault(CAUSAL, "flash_v1", "_forward_kernel", "L + per_head + rows, l_new", "L + per_head + rows, l"),
    "last tile of keys dropped": Fault(CAUSAL, "flash_v1", "_forward_kernel", "range(0, seq_k, BLOCK_K)", "range(0, 96, BLOCK_K)"),
    "first tile of queries skipped": Fault(
        CAUSAL, "flash_v1", "_forward_kernel", "start // BLOCK_Q * BLOCK_Q", "(start // BLOCK_Q + 1) * BLOCK_Q"
    ),
    "last tile of queries dropped": Fault(CAUSAL, "flash_v1", "_forward_kernel", "end + 1, BLOCK_Q)", "end - BLOCK_Q, BLOCK_Q)"),
    "softcap not applied": Fault(SOFTCAP, "flash_v1", "_forward_kernel", "s = cap * tanh", "_ = cap * tanh"),
    "slope of another head": Fault(ALIBI, "flash_v1", "_forward_kernel", "SLOPES + head", "SLOPES + head // GROUP"),
    "distance aligned top-left": Fault(ALIBI, "flash_v1", "_forward_kernel", "rows[:, None] + (seq_k - seq_q)", "rows[:, None]"),
    "documents of another batch entry": Fault(DOCUMENTS, "flash_v1", "_forward_kernel", "FIRST += batch * seq_q", "FIRST += 0"),
    "wrong key/value head": Fault(CAUSAL, "flash_v1", "_forward_kernel", "head // GROUP * stride_vh", "head % GROUP * stride_vh"),
    "lse in base 2": Fault(CAUSAL, "flash_v1", "_forward_kernel", "(m + tl.log2(l)) * LN2", "(m + tl.log2(l))"),
    "lse without the row sum": Fault(CAUSAL, "flash_v1", "_forward_kernel", "(m + tl.log2(l)) * LN2", "m * LN2"),
    "dq not accumulated": Fault(CAUSAL, "flash_v1", "_backward_kernel", "dq += dot(", "dq = dot("),
    "no scale in dq": Fault(CAUSAL, "flash_v1", "_backward_kernel", "PRECISION) * scale  # line 21", "PRECISION)  # line 21"),
    "no scale in dk": Fault(CAUSAL, "flash_v1", "_backward_kernel", "dk * scale, cols", "dk, cols"),
    "delta dropped": Fault(CAUSAL, "flash_v1", "_backward_kernel", "(dp - delta[:, None])", "dp"),
    "gradient of lse dropped": Fault(CAUSAL, "flash_v1", "_backward_kernel", "delta -= tl.load", "_ = tl.load"),
    "mask dropped in the backward": Fault(CAUSAL, "flash_v1", "_backward_kernel", "tl.where(seen,", "tl.where(seen | True,"),
    "softcap's derivative dropped": Fault(SOFTCAP, "flash_v1", "_backward_kernel", "(1.0 - bent * bent)", "(1.0 - 0.0 * bent)"),
    "group of one in the backward": Fault(CAUSAL, "flash_v1", "_backward_kernel", "range(GROUP)", "range(1)"),
    "documents of another batch entry in the backward": Fault(
        DOCUMENTS, "flash_v1", "_backward_kernel", "LAST += batch * seq_q", "LAST += 0"
    ),
}  # fmt: skip

FAULTS = {"flash_v2": SHARED | V2, "flash_v1": V1}
assert len(FAULTS["flash_v2"]) == len(SHARED) + len(V2)  # no two of one name


def files_of(rung: str) -> tuple[str, ...]:
    """What a rung is made of, and itself."""
    return "asked", "tile_ops", "launch", "documents", BACKWARD, rung


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("rung", TRITON_RUNGS)
def test_without_a_fault(rung, name, tmp_path, monkeypatch):
    planted(files_of(rung), None, tmp_path, monkeypatch)
    CHECKS[name]("mutant")


@pytest.mark.parametrize(("rung", "what"), [(rung, what) for rung, faults in FAULTS.items() for what in faults])
def test_fault_is_caught(rung, what, tmp_path, monkeypatch):
    fault = FAULTS[rung][what]
    planted(files_of(rung), fault, tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=r"rms error|max error|NaN in the result|infinities differ"):
        CHECKS[fault.caught_by]("mutant")
