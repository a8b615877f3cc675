"""Tests must be able to fail: each fault below is planted in a copy of flash_v2, and the checks that pass for it must go red."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kernels import flash_v2, tile_ops
from kernels.attention import BACKENDS
from tests.reference import check, make_case

pytestmark = pytest.mark.filterwarnings("ignore")

FAULTS = {
    "causal mask one to the right": (
        "seen = seen & (cols <= rows + (seq_k - seq_q))",
        "seen = seen & (cols <= rows + (seq_k - seq_q) + 1)",
    ),
    "causal mask one to the left": (
        "seen = seen & (cols <= rows + (seq_k - seq_q))",
        "seen = seen & (cols < rows + (seq_k - seq_q))",
    ),
    "mask aligned top-left": ("seen = seen & (cols <= rows + (seq_k - seq_q))", "seen = seen & (cols <= rows)"),
    "keys beyond the end are seen": ("seen = cols < seq_k", "seen = cols < seq_k + 1"),
    "one unmasked tile too many": (
        "whole = tl.minimum(whole, tl.maximum(diagonal + 1, 0))",
        "whole = tl.minimum(whole, tl.maximum(diagonal + BLOCK_K, 0))",
    ),
    "last tile dropped": ("end = tl.minimum(end, tl.maximum(diagonal + BLOCK_Q, 0))", "end = whole // BLOCK_K * BLOCK_K"),
    "output not rescaled": ("acc = acc * rescale[:, None]", "acc = acc * 1.0"),
    "row sum not rescaled": ("l = l * rescale + tl.sum(p, 1)", "l = l + tl.sum(p, 1)"),
    "stale maximum": ("        m = m_new\n", "        m = tl.where(first == 0, m_new, m)\n"),
    "lse in base 2": ("(m * qk_scale + tl.log2(l)) * LN2)", "(m * qk_scale + tl.log2(l)))"),
    "lse without the maximum": ("(m * qk_scale + tl.log2(l)) * LN2)", "tl.log2(l) * LN2)"),
    "blind rows divided by zero": ("o = acc / tl.where(blind, 1.0, l)[:, None]", "o = acc / l[:, None]"),
    "no scale in dq": ("dq * scale, rows", "dq, rows"),
    "no scale in dk": ("dk * scale, cols", "dk, cols"),
    "gradient of lse dropped": ("delta -= tl.load(DLSE", "delta -= 0.0 * tl.load(DLSE"),
    "gradient of lse with the wrong sign": ("delta -= tl.load(DLSE", "delta += tl.load(DLSE"),
    "delta dropped in dk": ("ds = p * (dp - delta[None, :])", "ds = p * dp"),
    "dk's mask one to the right": (
        "p = tl.where(cols[:, None] <= rows[None, :] + (seq_k - seq_q), p, 0.0)",
        "p = tl.where(cols[:, None] <= rows[None, :] + (seq_k - seq_q) + 1, p, 0.0)",
    ),
    "first query tile skipped in dk": (
        "cut = tl.minimum(tl.maximum(diagonal, 0) // BLOCK_Q * BLOCK_Q, seq_q)",
        "cut = tl.minimum(tl.maximum(diagonal, 0) // BLOCK_Q * BLOCK_Q + BLOCK_Q, seq_q)",
    ),
    "group of one in dk": ("for member in range(group):", "for member in range(1):"),
    "wrong key/value head": ("k_base = K + batch * stride_kb + head // group", "k_base = K + batch * stride_kb + head % group"),
    "heads swapped in dk": ("head = kv_head * group + member", "head = member * n_kv_head + kv_head"),
    "padded columns read": (
        "inside = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM\n",
        "inside = tl.arange(0, BLOCK_D)[None, :] < BLOCK_D\n",
    ),
    "ragged rows counted": ("RAGGED=seq_q % tile.block_q != 0", "RAGGED=False"),
    "tile missing in the grid": ("triton.cdiv(seq_k, tile.block_k) * batch", "max(1, seq_k // tile.block_k) * batch"),
}  # fmt: skip


def checks(backend: str) -> None:
    """A few shapes of tests/test_flash_v2.py, each with several tiles, a ragged end, and something of its own."""
    check(make_case(1, 4, 2, 70, 100, 24, torch.float32), backend, is_causal=True)
    check(make_case(1, 1, 1, 100, 70, 16, torch.float32), backend, is_causal=True)
    check(make_case(2, 1, 1, 40, 70, 16, torch.float32), backend)


def planted(folder: Path, old: str, new: str) -> ModuleType:
    """flash_v2 and its tile operations with every `old` turned into `new`, as modules of their own."""
    sources = {"mutant": Path(flash_v2.__file__).read_text(), "mutant_ops": Path(tile_ops.__file__).read_text()}
    assert old in "".join(sources.values()), "the fault no longer fits the source: move it along"
    modules = {}
    for name in ("mutant_ops", "mutant"):
        path = folder / f"{name}.py"
        path.write_text(sources[name].replace(old, new).replace("from kernels.tile_ops import", "from mutant_ops import"))
        spec = importlib.util.spec_from_file_location(name, path)
        modules[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return modules["mutant"]


def test_without_a_fault(tmp_path, monkeypatch):
    monkeypatch.setitem(BACKENDS, "mutant", planted(tmp_path, "import math", "import math"))
    checks("mutant")


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(tmp_path, monkeypatch, fault):
    monkeypatch.setitem(BACKENDS, "mutant", planted(tmp_path, *FAULTS[fault]))
    with pytest.raises(AssertionError):
        checks("mutant")
