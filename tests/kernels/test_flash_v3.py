"""flash_v3's parts that run without a Hopper GPU: the small kernels before and after its backward, and its settings.

The Gluon kernels themselves are compiled in test_compile.py and run in tests/gpu.
"""

import dataclasses
import math

import pytest
import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flash_ladder.kernels.asked import Asked, numbers_for_kernels
from flash_ladder.kernels.flash_v3 import launch as flash_v3
from flash_ladder.kernels.flash_v3.pre_post import postprocess_kernel, preprocess_kernel

TILE = flash_v3.QUERIES
CASES = [(64, 128), (80, 1), (128, 100), (16, 65), (192, 70)]


def padded(x: torch.Tensor, block_d: int) -> torch.Tensor:
    """[B, H, S, D] with zeros up to whole tiles and block_d columns: [B, H, tiles, 64, block_d]."""
    batch, n_head, seq, head_dim = x.shape
    tiles = -(-seq // TILE)
    whole = x.new_zeros(batch, n_head, tiles * TILE, block_d)
    whole[:, :, :seq, :head_dim] = x
    return whole.unflatten(2, (tiles, TILE))


@pytest.mark.parametrize(("head_dim", "seq"), CASES)
def test_preprocess(head_dim, seq):
    """Row statistics, infinite for rows that see nothing and rows beyond the end; a cleared sum and counters."""
    block_d = max(64, triton.next_power_of_2(head_dim))
    output, grad = torch.randn(2, 2, 3, seq, head_dim).unbind()
    lse, grad_lse = torch.randn(2, 2, 3, seq).unbind()
    lse = lse.clone()
    lse[:, :, 0] = -math.inf
    tiles = 6 * -(-seq // TILE)
    stats, sums = torch.full((tiles, 2, TILE), 7.0), torch.full((tiles, TILE * block_d), 7.0)
    counter = torch.full((1 + tiles,), 7, dtype=torch.int32)
    sizes = (*output.stride()[:3], *grad.stride()[:3], 3, seq, head_dim, block_d, TILE)
    preprocess_kernel[(tiles,)](output, grad, lse, grad_lse, stats, sums, counter, *sizes)
    expected = torch.full((2, 3, -(-seq // TILE) * TILE), math.inf)
    expected[:, :, :seq] = torch.where(lse.isinf(), math.inf, lse / math.log(2))
    torch.testing.assert_close(stats[:, 0].flatten(), expected.flatten())
    delta = padded(((output * grad).sum(-1) - grad_lse)[..., None], 1)
    torch.testing.assert_close(stats[:, 1].flatten(), delta.flatten())
    assert not sums.any() and not counter.any()


@pytest.mark.parametrize(("head_dim", "seq"), CASES)
def test_postprocess(head_dim, seq):
    """The sum as a warpgroup's threads hold it, back in order, scaled, and nothing written beside it."""
    block_d = max(64, triton.next_power_of_2(head_dim))
    dq = torch.randn(2, 3, seq, head_dim)
    # [tile, row / 16, row / 8 % 2, row % 8, part, column / 8, column % 8 / 2, column % 2], as wgmma spreads them over threads.
    spread = padded(dq, block_d).flatten(0, 2).reshape(-1, 4, 2, 8, block_d // 64, 8, 4, 2)
    held = spread.permute(0, 4, 5, 1, 3, 6, 2, 7).contiguous()
    room = torch.full((2, seq + 2, 3, head_dim + 8), 5.0, dtype=torch.bfloat16)
    found = room[:, 1:-1, :, :head_dim].transpose(1, 2)
    sizes = (*found.stride()[:3], 3, seq, 0.5, head_dim, block_d, TILE)
    postprocess_kernel[(held.shape[0],)](held, found, *sizes)
    torch.testing.assert_close(found, (dq * 0.5).bfloat16())
    found.fill_(5.0)
    assert (room == 5.0).all()


def test_reachable_copies_what_tma_cannot_reach():
    whole = torch.randn(2, 3, 16, 64).bfloat16()
    assert flash_v3.reachable(whole) is whole
    for x in (
        whole[..., 4:20],
        whole[:1].expand(2, -1, -1, -1),
        whole[..., :44:].contiguous(),
        whole.flatten()[1:-63].view(2, 1, 16, -1)[..., :40],
    ):
        copy = flash_v3.reachable(x)
        assert copy is not x and torch.equal(copy, x)


def test_a_descriptor_is_what_triton_makes():
    """Built without its checks, which its own constructor makes here."""
    x = torch.randn(2, 16, 3, 64).bfloat16().transpose(1, 2)
    found = flash_v3._descriptor(x, 1, 1, 16, 64)
    layout = gl.NVMMASharedLayout.get_default_for([1, 1, 16, 64], gl.bfloat16)
    expected = TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, 16, 64], layout)
    assert type(found) is TensorDescriptor and found.base is x
    for field in dataclasses.fields(TensorDescriptor)[1:]:
        value = getattr(expected, field.name)
        assert getattr(found, field.name) == value and type(getattr(found, field.name)) is type(value)


def given(seq: int, *, causal: bool = True, head_dim: int = 64, **asked) -> flash_v3.Inputs:
    """What flash_v3 is told of inputs; asked: window_size, softcap, documents, slopes."""
    numbers = numbers_for_kernels(Asked(1.0, causal, asked.get("window_size"), asked.get("softcap")), seq, seq)
    documents, slopes = asked.get("documents", False), asked.get("slopes", False)
    return flash_v3.Inputs(torch.device("cuda"), torch.bfloat16, (1, 1, seq, head_dim), 1, seq, numbers, documents, slopes)


def test_forward_settings():
    """Blocks of 64 keys where masks make few of them; two warpgroups, Q in registers, for short causal sequences and softcaps."""
    dense, short, cut = flash_v3.Forward(3, 2, False), flash_v3.Forward(2, 3, True), flash_v3.Forward(3, 3, False, 64)
    for inputs, expected in (
        (given(4096), dense),
        (given(1024, causal=False), dense),
        (given(1024), short),
        (given(1024, documents=True), short),
        (given(4096, softcap=30.0, window_size=512), short),
        (given(4096, window_size=512), cut),
        (given(4096, documents=True), cut),
        (given(4096, slopes=True), cut),
        (given(4096, head_dim=128, window_size=512), flash_v3.Forward(2, 4, False, 64)),
        (given(4096, head_dim=128, window_size=512, causal=False), flash_v3.Forward(2, 4, False, 64)),
        (given(4096, head_dim=128, window_size=513, causal=False), flash_v3.Forward(2, 2, False)),
        (given(4096, head_dim=128), flash_v3.Forward(2, 2, False)),
        (given(4096, head_dim=256), flash_v3.Forward(2, 2, False, 64)),
    ):
        assert flash_v3.forward_setting(inputs) == expected, inputs


def test_what_the_forward_masks():
    """Whether blocks before a tile's last may be cut at their end, and whether the first of two warpgroups sees half of the last:
    under causality the diagonal alone says so, whatever else cuts the beginnings."""
    for inputs, expected in (
        (given(4096, head_dim=128), (False, True)),
        (given(4096, head_dim=128, window_size=2048), (False, True)),
        (given(4096, head_dim=128, documents=True), (False, True)),
        (given(4096, documents=True), (False, False)),
        (given(4096, head_dim=128, causal=False), (False, False)),
        (given(4096, head_dim=128, causal=False, window_size=2048), (True, False)),
        (given(4096, head_dim=128, causal=False, documents=True), (True, False)),
        (given(4096, head_dim=128, documents=True)._replace(seq_k=4096 + 64), (False, False)),
        (given(4096, head_dim=128, window_size=2048)._replace(seq_k=4096 + 1), (True, False)),
    ):
        constants = flash_v3.forward_constants(inputs, flash_v3.forward_setting(inputs))
        found = constants.BETWEEN, constants.HALF
        assert found == expected, inputs


def named(kernel, values) -> dict:
    """The last arguments of a kernel by their names."""
    return dict(zip(kernel.arg_names[-len(values) :], values, strict=True))


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [(flash_v3.forward_kernel, flash_v3.ForwardConstants), (flash_v3.backward_kernel, flash_v3.BackwardConstants)],
)
def test_constants_have_the_names_of_the_kernel_s_arguments(kernel, constants):
    """In its order: they are handed over by position. It has no other constants, and these come last."""
    assert [p.name for p in kernel.params if p.is_constexpr] == list(constants._fields)
    assert kernel.arg_names[-len(constants._fields) :] == list(constants._fields)


def test_a_plan_s_numbers_meet_the_kernel_s_arguments(monkeypatch):
    """What is asked, sizes and constants, each under its name."""
    monkeypatch.setattr(flash_v3, "multiprocessors", lambda device: 132)
    inputs = given(4096, window_size=512, softcap=30.0)._replace(shape=(2, 6, 4096, 64), n_kv_head=3, seq_k=5000)
    asked = inputs.numbers._asdict()
    plan, setting = flash_v3.forward_plan(inputs, torch.bfloat16, None), flash_v3.forward_setting(inputs)
    sizes = {"n_head": 6, "seq_q": 4096, "seq_k": 5000, "n_tile": 32, "n_tiles": 384, "heads_at_once": 12, "batch_heads": 12}
    expected = asked | sizes | flash_v3.forward_constants(inputs, setting)._asdict()
    assert named(flash_v3.forward_kernel, plan.numbers) == expected
    plan = flash_v3.backward_plan(inputs, True)
    sizes = {"n_kv_head": 3, "seq_q": 4096, "seq_k": 5000, "n_tile": 40, "n_tiles": 240, "heads_at_once": 4, "batch_heads": 6}
    expected = asked | sizes | flash_v3.backward_constants(inputs, True)._asdict()
    assert named(flash_v3.backward_kernel, plan.numbers) == expected
    for kernel, heads in ((flash_v3.forward_kernel, "n_head"), (flash_v3.backward_kernel, "n_kv_head")):
        first = kernel.arg_names.index(heads)
        assert kernel.arg_names[first : first + 7] == [heads, *flash_v3.Sizes._fields[1:]]


def test_backward_buffers():
    """Two blocks of keys and values where they fit and are changed often."""
    for inputs, expected in (
        (given(4096), 2),
        (given(4096, causal=False), 1),
        (given(4096, causal=False, documents=True), 2),
        (given(1024, causal=False), 2),
        (given(4096, softcap=30.0), 1),
        (given(4096, head_dim=128), 1),
    ):
        assert flash_v3.backward_buffers(inputs) == expected, inputs
