"""What the flash rungs touch: strides, padding, alignment, tiles nobody sees, and nothing outside their outputs."""

import pytest
import torch

from flash_ladder.kernels import attention, tile_ops
from flash_ladder.kernels.asked import Asked
from flash_ladder.kernels.bounds import key_bounds
from flash_ladder.kernels.choice import BACKENDS
from flash_ladder.kernels.jit import INTERPRET
from flash_ladder.kernels.tiles import Tile, Tiles, TilesV1
from tests.helpers.reference import (
    DEVICE,
    MEANINGS,
    NAMES,
    RUNGS,
    check,
    documents,
    finest,
    make_case,
    n_unlike,
    run,
    skip_unless_runs,
)

pytestmark = [pytest.mark.filterwarnings("ignore:flash_v"), pytest.mark.parametrize("rung", RUNGS)]

FP16, FP32 = torch.float16, torch.float32
GRADIENTS = ("output", "dq", "dk", "dv")


# ---- strides and alignment ----


def views_of(base: str, batch, heads, seq, head_dim, dtype):
    """The same values behind different strides, NaN all around."""
    torch.manual_seed(1)
    x = torch.randn(batch, heads, seq, head_dim, dtype=dtype, device=DEVICE)
    if base == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if base == "sliced":
        wide = torch.full((batch, heads, seq, 3 * head_dim), float("nan"), dtype=dtype, device=DEVICE)
        wide[..., head_dim : 2 * head_dim] = x
        return wide[..., head_dim : 2 * head_dim]
    if base == "padded":
        long = torch.full((batch, heads, 2 * seq, head_dim), float("nan"), dtype=dtype, device=DEVICE)
        long[:, :, 20 : 20 + seq] = x
        return long[:, :, 20 : 20 + seq]
    if base == "misaligned":
        flat = torch.full((x.numel() + 3,), float("nan"), dtype=dtype, device=DEVICE)
        flat[3:] = x.flatten()
        return flat[3:].view_as(x)
    return x[:, :1].expand(-1, heads, -1, -1)


@pytest.mark.parametrize("name", ["causal", "causal window"])
@pytest.mark.parametrize(
    ("base", "head_dim"), [("transposed", 24), ("sliced", 24), ("padded", 24), ("padded", 16), ("misaligned", 24), ("expanded", 24)]
)
def test_strides(rung, base, head_dim, name):
    """Any strides with a contiguous last dimension: nothing outside the tensors is read into the result."""
    skip_unless_runs(rung, finest(rung), head_dim, **MEANINGS[name])
    inputs = [views_of(base, 1, 2, 45, head_dim, finest(rung)).requires_grad_() for _ in range(3)]
    plain = [x.detach().contiguous().requires_grad_() for x in inputs]
    results = []
    for tensors in (inputs, plain):
        output = attention(*tensors, backend=rung, **MEANINGS[name])
        results.append((output, *torch.autograd.grad((output * output).sum(), tensors)))
    assert n_unlike(rung, *results, GRADIENTS) == 0


@pytest.mark.parametrize("upstream", ["sum", "transposed", "half precision sum"])
def test_upstream_gradient_strides(rung, upstream):
    """.sum() sends back a gradient with stride 0 everywhere; a transpose sends back a transposed one."""
    dtype = FP16 if "half" in upstream else finest(rung)
    skip_unless_runs(rung, dtype, 16)
    inputs = [torch.randn(1, 2, 40, 16, dtype=dtype, device=DEVICE, requires_grad=True) for _ in range(3)]
    output = attention(*inputs, backend=rung)
    if upstream == "transposed":
        weight = torch.randn(1, 2, 16, 40, dtype=dtype, device=DEVICE)
        found = torch.autograd.grad((output.transpose(2, 3) * weight).sum(), inputs, retain_graph=True)
        grad_output = weight.transpose(2, 3).contiguous()
    else:
        found = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
        grad_output = torch.ones_like(output)
    for a, b in zip(found, torch.autograd.grad(output, inputs, grad_output), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("what", ["slopes", "slopes in float64", "document ids"])
def test_strides_of_the_small_tensors(rung, what):
    """Slopes and document ids may be views too, and slopes of another dtype."""
    if what == "document ids":
        plain = {"document_ids": documents(40, (13,), (20, 21)).int()}
        meaning = {"document_ids": plain["document_ids"].long().T.contiguous().T}
    else:
        dtype = torch.float64 if "float64" in what else FP32
        plain = {"alibi_slopes": torch.tensor([0.5, 0.125], device=DEVICE)}
        meaning = {"alibi_slopes": torch.tensor([0.5, 9.0, 0.125, 9.0], dtype=dtype, device=DEVICE)[::2]}
    skip_unless_runs(rung, finest(rung), 16, **plain)
    inputs = [torch.randn(2, 2, 40, 16, dtype=finest(rung), device=DEVICE) for _ in range(3)]
    assert torch.equal(attention(*inputs, backend=rung, **meaning), attention(*inputs, backend=rung, **plain))


def test_strides_that_need_64_bits_inside_a_tile(rung):
    """Rows 2^25 elements apart: a tile of 64 spans 2^31. tests/gpu reads from beyond that; here the tensors are three rows long."""
    skip_unless_runs(rung, FP16, 16)
    inputs = [torch.empty(3, 2**25, dtype=FP16, device=DEVICE)[:, :16].unflatten(0, (1, 1, 3)).normal_() for _ in range(4)]
    assert inputs[0].stride(2) == 2**25
    results = []
    for query, key, value, grad_output in (inputs, [x.contiguous() for x in inputs]):
        tensors = [x.requires_grad_() for x in (query, key, value)]
        output = attention(*tensors, is_causal=True, backend=rung)
        results.append((output, *torch.autograd.grad(output, tensors, grad_output)))
    assert n_unlike(rung, *results, GRADIENTS) == 0


# ---- outputs ----


@pytest.mark.parametrize("name", ["causal", "window of one", "everything"])
def test_writes_nothing_outside_its_outputs(rung, monkeypatch, name):
    """Outputs are slices of a larger buffer of canaries; every element inside is written, none outside is touched.

    The slices begin at multiples of 16 bytes, as all that `heads_last` makes for flash_v3 does.
    """
    skip_unless_runs(rung, finest(rung), 24, **MEANINGS[name])
    buffers = []

    def guarded(x, dtype=None):
        batch, heads, seq, head_dim = x.shape
        buffer = torch.full((batch, seq + 2, heads, head_dim + 16), -7.0, dtype=dtype or x.dtype, device=x.device)
        inside = buffer[:, 1:-1, :, 8:-8]
        inside.fill_(float("nan"))
        buffers.append(buffer)
        return inside.transpose(1, 2)

    module = BACKENDS[rung]
    monkeypatch.setattr(module, "heads_last", guarded)
    inputs = [torch.randn(2, 2, 37, 24, dtype=finest(rung), device=DEVICE) for _ in range(3)]
    asked = Asked(**MEANINGS[name] | {"scale": 0.2})
    output, lse = module.forward(*inputs, asked)
    module.backward(torch.randn_like(output), None, *inputs, output, lse, asked)
    assert len(buffers) == 4
    for buffer in buffers:
        assert buffer[:, 1:-1, :, 8:-8].isfinite().all()
        outside = buffer.clone()
        outside[:, 1:-1, :, 8:-8] = -7.0
        assert (outside == -7.0).all()


def test_float32_output_for_ring_steps(rung):
    skip_unless_runs(rung, FP16, 32)
    case, module = make_case(1, 2, 1, 50, 50, 32, FP16), BACKENDS[rung]
    query, key, value = case.inputs(FP16)
    asked = Asked(0.2, is_causal=True)
    output, lse = module.forward(query, key, value, asked, output_dtype=FP32)
    rounded, same = module.forward(query, key, value, asked)
    assert output.dtype == FP32 and torch.equal(output.half(), rounded) and torch.equal(lse, same)
    grads = module.backward(case.grad_output.float(), None, query, key, value, output, lse, asked)
    assert all(g.dtype == FP16 and g.isfinite().all() for g in grads)


# ---- tiles ----


@pytest.mark.parametrize("asked", [{}, {"window_size": 20}, {"document_ids": torch.arange(50)[None] // 20}])
def test_the_backward_takes_its_tiles_by_what_cuts(rung, monkeypatch, asked):
    """A window and documents have rows of their own in flash_v2's table; causality alone has not."""
    if rung != "flash_v2":
        pytest.skip("flash_v2's table alone has such rows")
    module, heard = BACKENDS[rung], []
    real = module.tiles
    monkeypatch.setattr(module, "tiles", lambda *kind: heard.append(kind[5:]) or real(*kind))
    inputs = [torch.randn(1, 1, 50, 32, device=DEVICE, dtype=FP16, requires_grad=True) for _ in range(3)]
    given = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in asked.items()}
    torch.autograd.grad(attention(*inputs, is_causal=True, backend=rung, **given).sum(), inputs)
    assert heard == [(), (bool(asked),)]


# Beyond FAR, no tile of queries or keys shares anything with one that the poison below reaches: tiles are of up to 64 positions in
# the interpreter and up to 128 on a GPU.
SEQ, FAR = (300, 260) if INTERPRET else (450, 390)


@pytest.mark.parametrize("name", ["causal", "window", "causal window", "documents"])
def test_keys_that_nobody_sees_may_be_nan(rung, name):
    """Tiles of which no query sees anything are not visited: NaN times a probability of zero would be NaN."""
    meaning = MEANINGS.get(name) or {"is_causal": "causal" in name, "document_ids": documents(SEQ, (30, 130, 256))}
    dtype = finest(rung)
    skip_unless_runs(rung, dtype, 16, **meaning)
    case = make_case(1, 1, 1, SEQ, SEQ, 16, dtype)
    clean = run(case, dtype, backend=rung, **meaning)
    if name == "causal":  # the last keys are poisoned, and the first queries see none of them
        poisoned, intact = slice(FAR, None), {"output": slice(0, 200), "lse": slice(0, 200), "dq": slice(0, 200)}
    else:
        poisoned, intact = slice(0, 30), dict.fromkeys(NAMES, slice(FAR, None))
    case.key[:, :, poisoned] = case.value[:, :, poisoned] = float("nan")
    dirty = run(case, dtype, backend=rung, **meaning)
    assert dirty[0].isnan().any()
    for name, a, b in zip(NAMES, clean, dirty, strict=True):
        if name in intact:
            assert n_unlike(rung, (a[:, :, intact[name]],), (b[:, :, intact[name]],), (name,)) == 0, name


@pytest.mark.skipif(not INTERPRET, reason="counts the interpreter's calls")
@pytest.mark.parametrize(
    ("name", "seq_q", "seq_k"),
    [(name, 200, 200) for name in ("causal", "window", "causal window", "documents", "causal documents")]
    + [(name, *shape) for name in ("causal", "window") for shape in ((100, 200), (200, 100))],
)
def test_no_tile_is_visited_in_vain(rung, name, seq_q, seq_k, monkeypatch):
    """The forward multiplies as many pairs of tiles as its queries see, counted from the mask; and so does the backward."""
    ids = documents(seq_q, (10, 70, 71, 150)) if "documents" in name else None
    asked = Asked(0.25, is_causal="causal" in name, window_size=20 if "window" in name else None, document_ids=ids)
    module, products, dot = BACKENDS[rung], [], tile_ops.dot
    monkeypatch.setattr(module, "dot", lambda *a: products.append(1) or dot(*a))
    inputs = [torch.randn(1, 1, seq, 16) for seq in (seq_q, seq_k, seq_k)]
    output, lse = module.forward(*inputs, asked)
    forward = len(products)
    module.backward(output, None, *inputs, output, lse, asked)
    pairs = COUNTS[rung](*(x[0].tolist() for x in key_bounds(asked, seq_q, seq_k)), seq_k)
    assert forward <= 2 * pairs[0] and len(products) - forward <= pairs[1]


def count_v1(lo: list[int], hi: list[int], seq_k: int) -> tuple[int, int]:
    """Pairs of a tile of keys and a tile of queries, of which some query sees some key; five products for each backward."""

    def pairs(block_q: int, block_k: int) -> int:
        total = 0
        for start in range(0, seq_k, block_k):
            stop = start + block_k - 1
            tiles = [i // block_q for i, (a, b) in enumerate(zip(lo, hi, strict=True)) if max(a, start) <= min(b, stop)]
            total += tiles[-1] - tiles[0] + 1 if tiles else 0
        return total

    return pairs(64, 32), 5 * pairs(32, 64)


def count_v2(lo: list[int], hi: list[int], seq_k: int) -> tuple[int, int]:
    """Tiles of keys from the first to the last that a tile of queries sees, three products each in dq; four in dk and dv."""
    forward = 0
    for start in range(0, len(lo), 64):
        seen = [(a, b) for a, b in zip(lo[start : start + 64], hi[start : start + 64], strict=True) if a <= b]
        forward += max(b for _, b in seen) // 32 - min(a for a, _ in seen) // 32 + 1 if seen else 0
    return forward, 3 * forward + 4 * count_v1(lo, hi, seq_k)[1] // 5


COUNTS = {"flash_v1": count_v1, "flash_v2": count_v2}


@pytest.mark.parametrize("tile", [(64, 16), (16, 128), (128, 32)])
def test_every_tile_shape_means_the_same(rung, monkeypatch, tile):
    if rung == "flash_v3":
        pytest.skip("its tiles are always of one shape")
    chosen = Tile(*tile, 4, 1)
    if rung == "flash_v1":
        monkeypatch.setattr(BACKENDS[rung], "tiles_v1", lambda *a: TilesV1(chosen, chosen))
    else:
        monkeypatch.setattr(BACKENDS[rung], "tiles", lambda *a: Tiles(chosen, chosen, chosen))
    check(make_case(1, 1, 1, 75, 150, 16, FP32), rung, is_causal=True)
    check(make_case(1, 1, 1, 150, 75, 16, FP32), rung, is_causal=True)
    check(make_case(1, 1, 1, 150, 150, 16, FP32), rung, window_size=40, document_ids=documents(150, (70, 140)))
