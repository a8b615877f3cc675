"""Kernels in Triton's interpreter: large tiles, and none of the work that Triton repeats for nothing."""

import pytest
import torch

from flash_ladder.kernels import attention
from flash_ladder.kernels.jit import INTERPRET
from flash_ladder.kernels.tiles import tiles, tiles_v1
from tests.helpers.reference import check, make_case

pytestmark = [pytest.mark.filterwarnings("ignore:flash_v"), pytest.mark.skipif(not INTERPRET, reason="about the interpreter")]

CPU = torch.device("cpu")


@pytest.fixture
def small_tiles():
    """Instead of conftest.py's: the tiles that a user gets."""


@pytest.mark.parametrize(("seq", "rows"), [(1, 16), (16, 16), (17, 32), (256, 256), (300, 512), (512, 512), (5000, 512)])
def test_tiles_are_as_large_as_the_sequence(seq, rows):
    ours = tiles(CPU, torch.float32, 64, seq, 100), tiles_v1(CPU, torch.float32, 64, seq, 100)
    for tile in (ours[0].forward, ours[0].dq, ours[0].dkdv, ours[1].forward, ours[1].backward):
        assert (tile.block_q, tile.block_k) == (rows, 128)


@pytest.mark.parametrize("rung", ["flash_v1", "flash_v2"])
def test_large_tiles_mean_the_same(rung):
    check(make_case(1, 2, 1, 100, 150, 24, torch.float32), rung, is_causal=True)
    check(make_case(1, 1, 1, 600, 600, 16, torch.float32), rung, is_causal=True, window_size=300)


@pytest.mark.parametrize("rung", ["flash_v1", "flash_v2"])
def test_a_launch_repeats_nothing_and_leaves_triton_as_it_was(rung, monkeypatch):
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patch, options, patched, checked = interpreter._patch_lang, interpreter.interpreter_builder.options, [], []
    monkeypatch.setattr(interpreter, "_patch_lang", counting := lambda f: patched.append(f.__globals__["__name__"]) or patch(f))
    monkeypatch.setattr(TritonSemantic, "device_assert", lambda *a: checked.append(a))
    attention(*torch.randn(3, 2, 2, 40, 16), is_causal=True, backend=rung)
    assert patched and len(patched) == len(set(patched)) and not checked
    assert interpreter._patch_lang is counting and interpreter.interpreter_builder.options is options
