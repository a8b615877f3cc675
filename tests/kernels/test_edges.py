"""attention at the edges that public bug reports of attention kernels lead to: strange numbers, layouts, transforms and imports."""

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from flash_ladder.kernels import attention, operators
from flash_ladder.kernels.asked import LARGEST_SCALE, Asked, n_blind
from flash_ladder.kernels.bounds import key_bounds
from flash_ladder.kernels.choice import BACKENDS
from tests.helpers.reference import DEVICE, RUNGS, finest

pytestmark = pytest.mark.filterwarnings("ignore")


def inputs(seq=20, head_dim=16, n_head=2, dtype=torch.float32, rung=None):
    """Query, key and value; for `rung`=flash_v3 of a head_dim and a dtype that it takes."""
    if rung == "flash_v3":
        head_dim, dtype = 64, finest(rung)
    generator = torch.Generator().manual_seed(seq + head_dim)
    return [torch.randn(1, n_head, seq, head_dim, generator=generator).to(DEVICE, dtype) for _ in range(3)]


# ---- numbers ----


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_is_not_positive_in_sdpa(scale, dtype):
    q, k, v = (x.requires_grad_() for x in inputs(dtype=dtype))
    found, right = (attention(q, k, v, is_causal=True, scale=scale, backend=b) for b in ("sdpa", "eager"))
    near = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, right, **near)
    grads = [torch.autograd.grad(x.float().square().sum(), (q, k, v)) for x in (found, right)]
    torch.testing.assert_close(*grads, **near)


@pytest.mark.parametrize("window", [2**62, 2**63 - 1, 2**63, 10**30])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_v2"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_window_beyond_every_integer_is_no_window(window, backend, is_causal):
    found, right = (
        attention(*inputs(), is_causal=is_causal, window_size=w, backend=b) for w, b in ((window, backend), (None, "eager"))
    )
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window_size": 5.0}, "window_size=5.0 must be a whole number"),
        ({"window_size": float("inf")}, "window_size=inf must be a whole number"),
        ({"scale": float("nan")}, "scale=nan must be a finite number"),
        ({"scale": float("inf")}, "scale=inf must be a finite number"),
        ({"softcap": float("nan")}, "softcap=nan must be positive and finite"),
        ({"softcap": float("inf")}, "softcap=inf must be positive and finite"),
    ],
)
@pytest.mark.parametrize("backend", ["eager", "flash_v2"])
def test_numbers_without_a_meaning(options, says, backend):
    with pytest.raises(ValueError, match=says):
        attention(*inputs(), backend=backend, **options)


def test_head_dim_zero():
    with pytest.raises(ValueError, match="has head_dim 0"):
        attention(*inputs(head_dim=0))


@pytest.mark.parametrize("backend", ["sdpa", *RUNGS])
@pytest.mark.parametrize("scale", [LARGEST_SCALE, -300.0])
def test_the_largest_scales(backend, scale):
    x = inputs(seq=200, head_dim=64, dtype=torch.bfloat16)
    ids = (torch.arange(200, device=DEVICE) // 70)[None]
    options = {"is_causal": True, "window_size": 40, "document_ids": ids}  # the first tile that a row meets is hidden from it
    found = attention(*x, scale=scale, backend=backend, **options)
    right = attention(*(t.double() for t in x), scale=scale, backend="eager", **options)
    torch.testing.assert_close(found.double(), right, rtol=0.01, atol=0.01)
    with pytest.raises(ValueError, match=r"cannot run here: scores times more than 1024 lose all digits .* eager can"):
        attention(*x, scale=1.1 * LARGEST_SCALE, backend=backend)
    huge = (attention(*x, scale=2.0**40, backend=b) for b in ("auto", "eager"))
    assert torch.equal(*huge)


@pytest.mark.parametrize("size", [64, 600])
def test_eager_does_not_overflow_in_float16(size):
    q, k, v = inputs(seq=40, head_dim=64, dtype=torch.float16)
    q, k = (size * q).requires_grad_(), (size * k).requires_grad_()
    assert (q.double() @ k.double().mT).abs().max() > 65504
    output, lse = attention(q, k, v, is_causal=True, return_lse=True, backend="eager")
    right = attention(q.double(), k.double(), v.double(), is_causal=True, backend="eager")
    assert size > 64 or (output - right).abs().max() < 2e-3
    assert output.isfinite().all() and lse.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.float().sum() + lse.sum(), (q, k)))


def test_alibi_keeps_its_digits_far_from_every_key():
    q = torch.randn(1, 1, 3000, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    k, v = (x[:, :1].bfloat16() for x in inputs(seq=8)[:2])
    for slopes in (torch.tensor([0.5], device=DEVICE), torch.tensor([0.37], device=DEVICE).bfloat16()):
        found = attention(q, k, v, alibi_slopes=slopes, backend="sdpa")
        right = attention(q.double(), k.double(), v.double(), alibi_slopes=slopes.double(), backend="eager")
        assert (found - right).abs().max() < 0.05
    x = inputs()
    half = torch.tensor([0.37, 0.11], device=DEVICE).bfloat16()  # the slopes are not exact in their own dtype
    found, right = (attention(*x, is_causal=True, alibi_slopes=half, backend=b) for b in ("sdpa", "eager"))
    torch.testing.assert_close(found, right)


# ---- rows that see no key ----


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window_size": 3}, {"is_causal": True, "window_size": 2}, {}])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(9, 4), (9, 8), (4, 9), (20, 1), (5, 5)])
def test_blind_rows_are_counted(options, seq_q, seq_k):
    asked = Asked(1.0, **options)
    lo, hi = key_bounds(asked, seq_q, seq_k)
    blind = (lo > hi).expand(1, seq_q)[0]
    assert max(0, n_blind(asked, seq_q, seq_k)) == blind.sum()
    assert blind[: blind.sum()].all()


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("options", [{"is_causal": True}, {"window_size": 5}])
def test_what_comes_from_above_for_a_row_that_sees_nothing_is_ignored(rung, options):
    (q, *_), (_, k, v) = inputs(seq=40, rung=rung), inputs(seq=20, rung=rung)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    output, lse = attention(*leaves, return_lse=True, backend=rung, **options)
    blind = lse.isinf()
    assert blind.any() and not blind.all()
    clean = [torch.ones_like(output), torch.ones_like(lse)]
    clean = [g.masked_fill(blind[..., None] if g.dim() == 4 else blind, 0.0) for g in clean]
    dirty = [g.masked_fill(blind[..., None] if g.dim() == 4 else blind, torch.nan) for g in clean]
    for found, right in zip(
        *(torch.autograd.grad((output, lse), leaves, g, retain_graph=True) for g in (dirty, clean)), strict=True
    ):
        assert torch.equal(found, right)


# ---- layouts ----


@pytest.mark.parametrize("rung", RUNGS)
def test_a_backward_reads_any_layout(rung):
    module = BACKENDS[rung]
    q, k, v = inputs(seq=50, n_head=3, rung=rung)
    asked = Asked(0.25, is_causal=True)
    output, lse = module.forward(q, k, v, asked)
    grad = torch.randn_like(output)
    right = module.backward(grad, None, q, k, v, output, lse, asked)
    strange = [x.mT.contiguous().mT for x in (q, k, v, output)]
    other_lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    assert all(x.stride(-1) != 1 for x in (*strange, other_lse))
    found = module.backward(grad.mT.contiguous().mT, None, *strange, other_lse, asked)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("rung", RUNGS)
def test_a_hook_may_give_saved_tensors_another_layout(rung):
    leaves = [x.requires_grad_() for x in inputs(seq=40, rung=rung)]
    right = torch.autograd.grad(attention(*leaves, is_causal=True, backend=rung).square().sum(), leaves)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.mT.contiguous().mT if x.dim() > 2 else x):
        found = torch.autograd.grad(attention(*leaves, is_causal=True, backend=rung).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


# ---- transforms and tracing ----


@pytest.mark.parametrize("rung", RUNGS)
def test_a_forward_mode_derivative_is_refused(rung):
    q, k, v = inputs(rung=rung)
    tangent = torch.ones_like(q)
    refused = pytest.raises(NotImplementedError, match="no forward-mode derivative")
    with refused:
        torch.func.jvp(lambda q: q + attention(q, k, v, is_causal=True, backend=rung), (q,), (tangent,))
    with refused, forward_ad.dual_level():
        attention(q, k, forward_ad.make_dual(v, tangent), backend=rung)
    with refused:
        torch.compile(lambda q: torch.func.jvp(lambda q: attention(q, k, v, backend=rung), (q,), (tangent,))[1], backend="eager")(q)


@pytest.mark.parametrize("rung", RUNGS)
def test_gradients_by_torch_func(rung):
    q, k, v = inputs(rung=rung)
    near = {"rtol": 0.02, "atol": 0.02} if q.dtype == torch.float16 else {}

    def loss(q, k, backend):
        output, lse = attention(q, k, v, is_causal=True, return_lse=True, backend=backend)
        return output.float().square().sum() + lse.sum()

    found, right = (torch.func.grad(loss, (0, 1))(q, k, backend) for backend in (rung, "eager"))
    torch.testing.assert_close(found, right, **near)
    many = torch.stack([q, 2 * q])
    each = torch.vmap(torch.func.grad(lambda q: loss(q, k, rung)))(many)
    torch.testing.assert_close(each[1], torch.func.grad(loss)(2 * q, k, "eager"), **near)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.jacrev(torch.func.grad(lambda q: loss(q, k, rung)))(q)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_compiled_call_takes_another_number_of_heads(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: attention(*x, is_causal=True, backend=backend), fullgraph=True, backend="eager")
    for n_head in (2, 4, 3):
        x = inputs(n_head=n_head)
        torch.testing.assert_close(compiled(*x), attention(*x, is_causal=True, backend="eager"))
    torch.jit.trace(lambda *x: attention(*x, is_causal=True, backend=backend), inputs())


@pytest.mark.parametrize("backend", ["eager", "sdpa", *RUNGS])
def test_a_number_that_changes_is_not_forgotten_by_the_compiler(backend):
    torch._dynamo.reset()
    x = inputs(rung=backend)
    cap = {"softcap": 1.0} if backend != "sdpa" else {}

    def call(q, k, v, t):
        changing = {name: t * value for name, value in cap.items()}
        return t * attention(q, k, v, is_causal=True, scale=0.25 / t, backend=backend, **changing)

    compiled = torch.compile(call, fullgraph=True)
    for t in (0.5, 0.7, 1.3, 2.0):
        torch.testing.assert_close(compiled(*x, t), call(*x, t), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa", *RUNGS])
def test_symbolic_sizes(backend):
    x = inputs(rung=backend)
    graph = make_fx(lambda *x: attention(*x, is_causal=True, backend=backend), tracing_mode="symbolic")(*x)
    x = inputs(seq=33, rung=backend)
    near = {"rtol": 0.02, "atol": 0.02} if x[0].dtype == torch.float16 else {}
    torch.testing.assert_close(graph(*x), attention(*x, is_causal=True, backend="eager"), **near)


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"window_size": 4}])
def test_meta_tensors(backend, options):
    meta = [x.to("meta") for x in inputs()]
    found = attention(*meta, is_causal=True, backend=backend, **options)
    assert found.device.type == "meta" and found.shape == meta[0].shape


# ---- the process around it ----


def test_threads_take_turns_in_the_interpreter():
    x = inputs(seq=40)
    right = attention(*x, is_causal=True, backend="flash_v2")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: attention(*x, is_causal=True, backend="flash_v2"), range(8)))
    assert all(torch.equal(one, right) for one in found)


def run(code, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=clean | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_leaves_the_environment_and_the_gpu_alone():
    code = "import os; before = dict(os.environ); import torch, flash_ladder.kernels; "
    code += "print(dict(os.environ) == before, torch.cuda.is_initialized())"
    assert run(code) == ["True", "False"]


def test_a_folder_named_triton_is_no_package(monkeypatch):
    from importlib.machinery import ModuleSpec

    from flash_ladder.kernels import jit

    monkeypatch.setattr(jit, "find_spec", lambda name: ModuleSpec(name, None))  # what Python finds of a folder without code
    assert not jit.has_triton()
    monkeypatch.setattr(jit, "find_spec", lambda name: None)
    assert not jit.has_triton()
    monkeypatch.undo()
    assert jit.has_triton()


def test_a_reload_keeps_the_operators():
    import importlib

    before = operators.attention_forward
    importlib.reload(operators)
    assert operators.attention_forward is before
    attention(*inputs(), backend="flash_v2")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    import triton

    from flash_ladder.kernels.launch import readable_cache_errors

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    with pytest.raises(OSError, match=r"Triton cannot keep what it compiles in .*TRITON_CACHE_DIR=PATH"), readable_cache_errors():
        raise FileNotFoundError(2, "No such file or directory", str(tmp_path / "a" / "b"))
    with pytest.raises(FileNotFoundError, match="elsewhere"), readable_cache_errors():
        raise FileNotFoundError(2, "No such file or directory", "elsewhere")


def test_no_warning_is_left_over():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*inputs(), is_causal=True)
