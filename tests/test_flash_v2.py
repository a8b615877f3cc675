"""flash_v2 against float64, judged by what eager attention loses in the same precision: output, lse and three gradients.

Without a GPU the kernels run in Triton's interpreter, tile by tile (64 queries by 32 keys), so sizes here stay small and cross
every tile boundary that matters.
"""

import pytest
import torch

from kernels import attention, flash_v2
from kernels.tiles import Tile, Tiles
from tests.reference import DEVICE, check, errors, make_case, run

pytestmark = pytest.mark.filterwarnings("ignore:flash_v2 runs in Triton's interpreter")

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize("head_dim", [16, 40, 59, 64, 80, 96, 111, 128, 256])
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
def test_head_dims(head_dim, dtype):
    check(make_case(1, 1, 1, 70, 70, head_dim, dtype), "flash_v2", is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("seq_q", "seq_k"), [(1, 100), (31, 31), (32, 32), (33, 33), (65, 65), (128, 128), (63, 129), (130, 40), (64, 31)]
)
def test_lengths(seq_q, seq_k, is_causal):
    check(make_case(1, 2, 2, seq_q, seq_k, 32, FP32), "flash_v2", is_causal=is_causal)


@pytest.mark.parametrize(("n_head", "n_kv_head"), [(4, 4), (4, 2), (6, 2), (5, 1)])
def test_grouped_heads(n_head, n_kv_head):
    check(make_case(2, n_head, n_kv_head, 40, 72, 16, FP32), "flash_v2", is_causal=True)


@pytest.mark.parametrize("seed", range(5))
def test_seeds(seed):
    check(make_case(1, 2, 1, 97, 97, 48, FP16, seed=seed), "flash_v2", is_causal=True)


def test_one_key():
    """With one key p is 1 and only the gradient of lse reaches query and key; dp and delta cancel to rounding."""
    case = make_case(1, 2, 2, 1, 1, 32, FP32)
    output, lse, dq, dk, dv = run(case, FP32, backend="flash_v2", is_causal=True, scale=0.5)
    weight = 0.5 * case.grad_lse[..., None]
    expected = (case.value, 0.5 * (case.query * case.key).sum(-1), weight * case.key, weight * case.query, case.grad_output)
    for a, b in zip((output, lse, dq, dk, dv), expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=5e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("size", [0.0, 5.0, 20.0], ids=["constant", "large logits", "one-hot rows"])
def test_ranges(size, dtype):
    check(make_case(1, 1, 1, 80, 80, 32, dtype, size=size), "flash_v2", is_causal=True)


def test_large_logits_in_float32():
    """The backward recomputes p = exp(s - lse): what float32 loses on lse itself, p inherits, and no more than a few times that."""
    case = make_case(1, 1, 1, 80, 80, 32, FP32, size=20.0)
    exact = run(case, torch.float64, backend="eager", is_causal=True)
    found = errors(run(case, FP32, backend="flash_v2", is_causal=True), exact)
    rounding = torch.finfo(FP32).eps * exact[1].abs().max().item()
    assert max(found["dq"], found["dk"], found["dv"]) < 2 * rounding and found["output"] < rounding


def test_an_outlier_in_every_tensor():
    case = make_case(1, 1, 1, 80, 80, 32, BF16)
    case.query[0, 0, 40, 3] = case.key[0, 0, 17, 3] = 60.0
    case.value[0, 0, 9] *= 100
    check(case, "flash_v2", is_causal=True)


def test_scale():
    check(make_case(1, 1, 1, 50, 50, 32, FP32), "flash_v2", is_causal=True, scale=0.9)


def test_rows_that_see_nothing():
    """The first 36 queries stand before the first key: output 0, lse -inf, no gradient, and nothing else disturbed."""
    output, lse, dq, dk, dv = run(make_case(1, 1, 1, 100, 64, 32, FP32), FP32, backend="flash_v2", is_causal=True)
    assert (output[:, :, :36] == 0).all() and (lse[:, :, :36] == -torch.inf).all() and (dq[:, :, :36] == 0).all()
    assert lse[:, :, 36:].isfinite().all() and dk.isfinite().all() and dv.isfinite().all()


# ---- memory: strides, padding, alignment ----


def views_of(base: str, batch, heads, seq, head_dim, dtype):
    """The same values behind different strides."""
    torch.manual_seed(1)
    x = torch.randn(batch, heads, seq, head_dim, dtype=dtype, device=DEVICE)
    if base == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if base == "sliced":
        wide = torch.full((batch, heads, seq, 3 * head_dim), float("nan"), dtype=dtype, device=DEVICE)
        wide[..., head_dim : 2 * head_dim] = x
        return wide[..., head_dim : 2 * head_dim]
    if base == "misaligned":
        flat = torch.full((x.numel() + 3,), float("nan"), dtype=dtype, device=DEVICE)
        flat[3:] = x.flatten()
        return flat[3:].view_as(x)
    if base == "expanded":
        return x[:, :1].expand(-1, heads, -1, -1)
    return x


@pytest.mark.parametrize("base", ["transposed", "sliced", "misaligned", "expanded"])
def test_strides(base):
    """Any strides with a contiguous last dimension, NaN all around: nothing outside the tensors is read into the result."""
    inputs = [views_of(base, 1, 2, 45, 24, FP32).requires_grad_() for _ in range(3)]
    plain = [x.detach().contiguous().requires_grad_() for x in inputs]
    results = []
    for tensors in (inputs, plain):
        output = attention(*tensors, is_causal=True, backend="flash_v2")
        results.append((output, *torch.autograd.grad((output * output).sum(), tensors)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("upstream", ["sum", "transposed", "half precision sum"])
def test_upstream_gradient_strides(upstream):
    """.sum() sends back a gradient with stride 0 everywhere; a transpose sends back a transposed one."""
    dtype = FP16 if "half" in upstream else FP32
    inputs = [torch.randn(1, 2, 40, 16, dtype=dtype, device=DEVICE, requires_grad=True) for _ in range(3)]
    output = attention(*inputs, backend="flash_v2")
    if upstream == "transposed":
        weight = torch.randn(1, 2, 16, 40, dtype=dtype, device=DEVICE)
        found = torch.autograd.grad((output.transpose(2, 3) * weight).sum(), inputs, retain_graph=True)
        grad_output = weight.transpose(2, 3).contiguous()
    else:
        found = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
        grad_output = torch.ones_like(output)
    for a, b in zip(found, torch.autograd.grad(output, inputs, grad_output), strict=True):
        torch.testing.assert_close(a, b)


def test_writes_nothing_outside_its_outputs(monkeypatch):
    """Outputs are slices of a larger buffer of canaries; every element inside is written, none outside is touched."""
    buffers = []

    def guarded(x, dtype=None):
        batch, heads, seq, head_dim = x.shape
        buffer = torch.full((batch, seq + 2, heads, head_dim + 8), -7.0, dtype=dtype or x.dtype, device=x.device)
        inside = buffer[:, 1:-1, :, 4:-4]
        inside.fill_(float("nan"))
        buffers.append(buffer)
        return inside.transpose(1, 2)

    monkeypatch.setattr(flash_v2, "heads_last", guarded)
    inputs = [torch.randn(2, 2, 37, 24, device=DEVICE) for _ in range(3)]
    output, lse = flash_v2.forward(*inputs, scale=0.2, is_causal=True)
    flash_v2.backward(torch.randn_like(output), None, *inputs, output, lse, scale=0.2, is_causal=True)
    assert len(buffers) == 4
    for buffer in buffers:
        assert buffer[:, 1:-1, :, 4:-4].isfinite().all()
        outside = buffer.clone()
        outside[:, 1:-1, :, 4:-4] = -7.0
        assert (outside == -7.0).all()


def test_offsets_beyond_32_bits_inside_a_tile(monkeypatch):
    """The 64-bit path gives the same bits; a stride that needs it does not fit in a test's memory."""
    inputs = [torch.randn(1, 1, 70, 16, device=DEVICE) for _ in range(3)]
    narrow = flash_v2.forward(*inputs, scale=0.25, is_causal=True)
    options = flash_v2._options
    monkeypatch.setattr(flash_v2, "_options", lambda *a: options(*a) | {"WIDE": True})
    wide = flash_v2.forward(*inputs, scale=0.25, is_causal=True)
    assert torch.equal(narrow[0], wide[0]) and torch.equal(narrow[1], wide[1])


# ---- the rest of the interface ----


def test_float32_output_for_ring_steps():
    case = make_case(1, 2, 1, 50, 50, 32, FP16)
    query, key, value = case.inputs(FP16)
    output, lse = flash_v2.forward(query, key, value, scale=0.2, is_causal=True, output_dtype=FP32)
    rounded, same = flash_v2.forward(query, key, value, scale=0.2, is_causal=True)
    assert output.dtype == FP32 and torch.equal(output.half(), rounded) and torch.equal(lse, same)
    grads = flash_v2.backward(case.grad_output.float(), None, query, key, value, output, lse, scale=0.2, is_causal=True)
    assert all(g.dtype == FP16 and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("tile", [(32, 64), (64, 16), (16, 128), (128, 32)])
def test_every_tile_shape_means_the_same(monkeypatch, tile):
    chosen = Tile(*tile, 4, 1)
    monkeypatch.setattr(flash_v2, "tiles", lambda *a: Tiles(chosen, chosen, chosen))
    check(make_case(1, 2, 1, 75, 150, 16, FP32), "flash_v2", is_causal=True)
    check(make_case(1, 1, 1, 150, 75, 16, FP32), "flash_v2", is_causal=True)


def test_same_bits_every_time():
    case = make_case(1, 4, 2, 90, 90, 32, FP16)
    first = run(case, FP16, backend="flash_v2", is_causal=True)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(case, FP16, backend="flash_v2", is_causal=True), strict=True))


def test_a_batch_changes_nothing():
    """A sequence gives the same bits alone and inside a batch."""
    inputs = [torch.randn(3, 2, 50, 32, device=DEVICE, dtype=FP16) for _ in range(3)]
    together = attention(*inputs, is_causal=True, backend="flash_v2")
    alone = attention(*(x[1:2] for x in inputs), is_causal=True, backend="flash_v2")
    assert torch.equal(together[1:2], alone)
