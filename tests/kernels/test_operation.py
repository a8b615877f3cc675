"""The operation: its meaning against a loop that anyone can check, its refusals, its choice, and its wiring into torch."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flash_ladder.kernels import Choice, Unsupported, attention, choose, eager, jit, launch
from flash_ladder.kernels.asked import ARGUMENTS, Asked
from flash_ladder.kernels.choice import BACKENDS, why_not
from flash_ladder.kernels.operators import attention_backward, attention_forward
from tests.helpers.reference import DEVICE, RUNGS, TRITON_RUNGS, documents, finest, skip_unless_runs, slopes

pytestmark = pytest.mark.filterwarnings("ignore:flash_v")


def by_hand(query, key, value, is_causal, window_size, softcap, alibi_slopes, document_ids):
    """One query, one key, one number at a time."""
    batch, n_head, seq_q, head_dim = query.shape
    n_kv_head, seq_k = key.shape[1], key.shape[2]
    output = torch.zeros_like(query)
    lse = torch.full((batch, n_head, seq_q), -math.inf, dtype=query.dtype)
    for b in range(batch):
        for h in range(n_head):
            for row in range(seq_q):
                i = row + seq_k - seq_q
                scores, values = [], []
                for j in range(seq_k):
                    if is_causal and j > i:
                        continue
                    if window_size is not None and abs(i - j) >= window_size:
                        continue
                    if document_ids is not None and document_ids[b, row] != document_ids[b, j]:
                        continue
                    s = query[b, h, row] @ key[b, h * n_kv_head // n_head, j] / math.sqrt(head_dim)
                    if softcap is not None:
                        s = softcap * torch.tanh(s / softcap)
                    if alibi_slopes is not None:
                        s = s - alibi_slopes[h] * abs(i - j)
                    scores.append(s)
                    values.append(value[b, h * n_kv_head // n_head, j])
                if scores:
                    lse[b, h, row] = torch.logsumexp(torch.stack(scores), 0)
                    output[b, h, row] = torch.softmax(torch.stack(scores), 0) @ torch.stack(values)
    return output, lse


MEANINGS = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window_size": 3},
    "causal window": {"is_causal": True, "window_size": 3},
    "softcap": {"is_causal": True, "softcap": 0.7},
    "alibi": {"is_causal": True, "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.03])},
    "documents": {"is_causal": True, "document_ids": torch.tensor([[0, 0, 0, 1, 1, 2, 2], [4, 4, 4, 4, 4, 4, 9]])},
    "full documents": {"document_ids": torch.tensor([[0, 0, 0, 1, 1, 2, 2], [4, 4, 4, 4, 4, 4, 9]])},
}
MEANINGS["everything, documents"] = {"softcap": 0.7, "window_size": 2} | MEANINGS["alibi"] | MEANINGS["documents"]


@pytest.mark.parametrize("name", MEANINGS)
@pytest.mark.parametrize(("seq_q", "seq_k"), [(7, 7), (4, 9), (9, 4), (1, 6)])
def test_meaning(name, seq_q, seq_k):
    if "documents" in name and seq_q != seq_k:
        pytest.skip("documents are for Sq == Sk")
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, s, 8, dtype=torch.float64) for h, s in ((4, seq_q), (2, seq_k), (2, seq_k)))
    every = dict.fromkeys(("is_causal", "window_size", "softcap", "alibi_slopes", "document_ids")) | MEANINGS[name]
    output, lse = by_hand(query, key, value, **every)
    eager, eager_lse = attention(query, key, value, backend="eager", return_lse=True, **MEANINGS[name])
    torch.testing.assert_close(eager, output)
    torch.testing.assert_close(eager_lse, lse)
    if every["softcap"] is None:
        torch.testing.assert_close(attention(query, key, value, backend="sdpa", **MEANINGS[name]), output)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_rows_that_see_nothing(backend):
    """Sq > Sk under causality: the first rows see no key."""
    query, key, value = (torch.randn(1, 2, s, 8, dtype=torch.float64, requires_grad=True) for s in (6, 4, 4))
    output = attention(query, key, value, is_causal=True, backend=backend)
    assert (output[:, :, :2] == 0).all()
    for grad in torch.autograd.grad(output.sum(), (query, key, value)):
        assert grad.isfinite().all()
    assert (torch.autograd.grad(attention(query, key, value, is_causal=True, backend=backend).sum(), query)[0][:, :, :2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("seq_q", "seq_k"), [(0, 5), (5, 0), (0, 0)])
def test_empty(backend, seq_q, seq_k):
    dtype = finest(backend)
    skip_unless_runs(backend, dtype, 16)
    query, key, value = (torch.randn(1, 2, s, 16, dtype=dtype, device=DEVICE, requires_grad=True) for s in (seq_q, seq_k, seq_k))
    output = attention(query, key, value, is_causal=True, window_size=3, backend=backend)
    assert output.shape == query.shape and (output == 0).all()
    for grad, x in zip(torch.autograd.grad(output.sum(), (query, key, value)), (query, key, value), strict=True):
        assert grad.shape == x.shape and (grad == 0).all()


@pytest.mark.parametrize("seq_k", [7, 4], ids=["every row sees", "blind rows"])
@pytest.mark.parametrize("name", MEANINGS)
def test_eager_backward_formulas(name, seq_k):
    """The written-out backward against torch's own differentiation, for every meaning."""
    if "documents" in name and seq_k != 7:
        pytest.skip("documents are for Sq == Sk")
    torch.manual_seed(0)
    shapes = [(4, 7), (2, seq_k), (2, seq_k)]
    inputs = [torch.randn(2, h, s, 8, dtype=torch.float64, requires_grad=True) for h, s in shapes]
    output, lse = eager.attend(*inputs, Asked(0.3, return_lse=True, **MEANINGS[name]))
    grads = torch.randn_like(output), torch.randn_like(lse)
    expected = torch.autograd.grad((output, lse), inputs, grads)
    found = eager.backward(*grads, *(x.detach() for x in (*inputs, output, lse)), Asked(0.3, **MEANINGS[name]))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# ---- refusals ----


def tensors(**change):
    shapes = {"query": (1, 4, 8, 16), "key": (1, 2, 8, 16), "value": (1, 2, 8, 16)} | change
    return [torch.randn(shapes[name]) for name in ("query", "key", "value")]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"query": (4, 8, 16)}, {}, "must be \\[B, H, S, D\\]"),
        ({"value": (1, 2, 9, 16)}, {}, "same shape"),
        ({"query": (2, 4, 8, 16)}, {}, "agree in batch"),
        ({"query": (1, 3, 8, 16)}, {}, "3 query heads cannot share 2"),
        ({}, {"window_size": 0}, "window_size=0"),
        ({}, {"softcap": -1.0}, "softcap=-1.0"),
        ({}, {"alibi_slopes": torch.ones(3)}, "alibi_slopes must be"),
        ({}, {"document_ids": torch.zeros(1, 7, dtype=torch.int32)}, "document_ids must be"),
        ({}, {"backend": "flash_v9"}, "'flash_v9' is not one of auto, eager, sdpa, flash_v1, flash_v2, flash_v3"),
    ],
)
def test_inputs_without_a_meaning(change, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*tensors(**change), **options)


def test_mixed_dtypes_and_strided_last_dimension():
    query, key, value = tensors()
    with pytest.raises(ValueError, match="share a floating dtype"):
        attention(query, key.double(), value)
    with pytest.raises(ValueError, match="query's last dimension must be contiguous"):
        attention(query.transpose(2, 3).contiguous().transpose(2, 3), key, value)


def test_refusal_names_who_can():
    query, key, value = (x.to(DEVICE) for x in tensors())
    able = " and ".join(["eager", *TRITON_RUNGS])  # flash_v3 takes no float32
    with pytest.raises(Unsupported, match=f"sdpa cannot run here: F.scaled_dot_product_attention has no softcap; {able} can"):
        attention(query, key, value, backend="sdpa", softcap=1.0)
    for rung in RUNGS:
        with pytest.raises(Unsupported, match=f"{rung} cannot run here: {rung} takes .* not float64; eager and sdpa can"):
            attention(query.double(), key.double(), value.double(), backend=rung)


@pytest.mark.parametrize("rung", TRITON_RUNGS)
def test_refusals_of_dtype_and_head_dim(rung):
    with pytest.raises(Unsupported, match="not float64"):
        choose(DEVICE, torch.float64, 64, backend=rung)
    for head_dim in (8, 272):
        with pytest.raises(Unsupported, match=f"head_dim 16 to 256, not {head_dim}"):
            choose(DEVICE, torch.float16, head_dim, backend=rung)


NO_INTERPRETER = "flash_v3 is written in Gluon, which has no interpreter: it needs a Hopper GPU"


def test_flash_v3_on_a_cpu():
    cpu = torch.device("cpu")
    for dtype, head_dim in ((torch.float16, 64), (torch.float32, 300)):
        assert why_not("flash_v3", cpu, dtype, head_dim, frozenset()) == NO_INTERPRETER
    with pytest.raises(Unsupported) as refused:
        attention(*(x.half() for x in tensors()), backend="flash_v3")
    assert f"flash_v3 cannot run here: {NO_INTERPRETER}; eager and sdpa" in str(refused.value)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (10, 0), (12, 0)])
def test_flash_v3_on_other_gpus(pretend_gpu, capability):
    pretend_gpu("Some GPU", capability)
    expected = f"flash_v3 needs a Hopper GPU (compute capability 9.0), not {capability[0]}.{capability[1]}"
    assert why_not("flash_v3", torch.device("cuda"), torch.float16, 64, frozenset()) == expected


@pytest.mark.parametrize(
    ("dtype", "head_dim", "expected"),
    [
        (torch.float32, 64, "flash_v3 takes float16 and bfloat16, not float32"),
        (torch.float64, 64, "flash_v3 takes float16 and bfloat16, not float64"),
        (torch.bfloat16, 100, "flash_v3 takes head_dim 16 to 256 in steps of 8, not 100"),
    ],
)
def test_what_flash_v3_refuses_on_hopper(pretend_gpu, dtype, head_dim, expected):
    """`auto` takes flash_v2 then, where that can run it, and says why."""
    pretend_gpu("NVIDIA H200", (9, 0))
    cuda = torch.device("cuda")
    assert why_not("flash_v3", cuda, dtype, head_dim, frozenset()) == expected
    choice = choose(cuda, dtype, head_dim)
    assert choice.backend == ("sdpa" if dtype == torch.float64 else "flash_v2")
    where = f"NVIDIA H200, Hopper sm_90, {str(dtype).removeprefix('torch.')}, head_dim {head_dim}"
    assert choice.reason.startswith(f"{where}; not flash_v3: {expected}")


def test_what_flash_v3_takes_on_hopper(pretend_gpu):
    """float16 and bfloat16, head_dim 16 to 256 in steps of 8, and every argument of attention."""
    pretend_gpu("NVIDIA H200", (9, 0))
    cuda, features = torch.device("cuda"), frozenset(ARGUMENTS)
    for dtype in (torch.float16, torch.bfloat16):
        taken = [d for d in range(1, 300) if why_not("flash_v3", cuda, dtype, d, features) is None]
        assert taken == list(range(16, 257, 8))
    assert str(choose(cuda, torch.bfloat16, 64, features=features)) == (
        "flash_v3 (NVIDIA H200, Hopper sm_90, bfloat16, head_dim 64; TMA and asynchronous wgmma tensor cores)"
    )


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about the interpreter, which runs where there is no GPU")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"TOO_LATE": True}, "Triton was imported before flash_ladder.kernels"),
        ({"INTERPRET": False}, "runs on the CPU only with TRITON_INTERPRET=1"),
        ({"NUMPY_TROUBLE": jit.numpy_trouble("3.6.0", "2.4.1")}, "interpreter needs numpy below 2.4, not 2.4.1"),
    ],
)
def test_an_interpreter_that_cannot_run(monkeypatch, change, message):
    for name, value in change.items():
        monkeypatch.setattr(jit, name, value)
    for rung in RUNGS:
        with pytest.raises(Unsupported, match=message):
            choose(DEVICE, torch.float32, 64, backend=rung)


# ---- the choice ----


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Puts a GPU into the machine: pretend_gpu(name, capability)."""

    def pretend(gpu_name: str, capability: tuple[int, int]) -> None:
        class Properties:
            name = gpu_name
            major, minor = capability

        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)

    return pretend


def test_choice_on_a_cpu():
    cpu = torch.device("cpu")
    assert str(choose(cpu, torch.float32, 64)) == "sdpa (CPU, float32, head_dim 64)"
    needs_lse = choose(cpu, torch.float32, 64, features=frozenset({"return_lse"}))
    assert needs_lse.backend == "eager" and "not sdpa: F.scaled_dot_product_attention has no return_lse" in needs_lse.reason


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "expected"),
    [
        ("Tesla T4", (7, 5), torch.float16, "flash_v2"),
        ("Tesla T4", (7, 5), torch.float32, "sdpa"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), torch.bfloat16, "flash_v2"),
        ("NVIDIA GeForce RTX 3090", (8, 6), torch.bfloat16, "flash_v2"),
        ("NVIDIA L4", (8, 9), torch.bfloat16, "flash_v2"),
        ("NVIDIA H200", (9, 0), torch.bfloat16, "flash_v3"),
        ("NVIDIA H200", (9, 0), torch.float16, "flash_v3"),
        ("NVIDIA H200", (9, 0), torch.float32, "flash_v2"),
        ("NVIDIA B200", (10, 0), torch.bfloat16, "flash_v2"),
        ("NVIDIA GeForce RTX 5090", (12, 0), torch.bfloat16, "flash_v2"),
        ("NVIDIA H200", (9, 0), torch.float64, "sdpa"),
        ("Tesla P100", (6, 0), torch.float16, "sdpa"),
    ],
)
def test_choice_by_generation(pretend_gpu, name, capability, dtype, expected):
    pretend_gpu(name, capability)
    choice = choose(torch.device("cuda"), dtype, 64)
    assert choice.backend == expected
    assert name in choice.reason and "head_dim 64" in choice.reason


def test_choice_says_what_it_passed_over(pretend_gpu):
    pretend_gpu("NVIDIA H200", (9, 0))
    assert choose(torch.device("cuda"), torch.bfloat16, 64, features=frozenset(ARGUMENTS)).backend == "flash_v3"
    choice = choose(torch.device("cuda"), torch.bfloat16, 300, features=frozenset({"is_causal", "document_ids"}))
    assert choice == Choice(
        "sdpa",
        "NVIDIA H200, Hopper sm_90, bfloat16, head_dim 300; not flash_v3: flash_v3 takes head_dim 16 to 256 in steps of 8, not 300"
        "; not flash_v2: flash_v2 takes head_dim 16 to 256, not 300",
    )


def test_pytorchs_switch_makes_sdpa_deterministic(pretend_gpu):
    """Where no rung runs, `auto` takes it then; without the switch it has no argument to ask by."""
    pretend_gpu("NVIDIA H200", (9, 0))
    cuda, asked = torch.device("cuda"), frozenset({"is_causal", "deterministic"})
    assert choose(cuda, torch.bfloat16, 300, features=asked).backend == "eager"
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(cuda, torch.bfloat16, 300, features=asked).backend == "sdpa"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_wish_for_determinism_reaches_the_backward(monkeypatch, compiled):
    """Asked for by argument or by PyTorch's switch; the rung whose sums need it must hear of it."""
    heard = []
    real = BACKENDS["flash_v2"].backward

    def backward(*tensors_and_asked):
        heard.append(tensors_and_asked[-1].deterministic)
        return real(*tensors_and_asked)

    monkeypatch.setattr(BACKENDS["flash_v2"], "backward", backward)
    query, key, value = (torch.randn(1, 1, 16, 16, device=DEVICE, requires_grad=True) for _ in range(3))

    def gradient(**asked):
        torch._dynamo.reset()
        call = torch.compile(attention, backend="aot_eager") if compiled else attention
        torch.autograd.grad(call(query, key, value, backend="flash_v2", **asked).sum(), query)

    gradient()
    gradient(deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        gradient()
        gradient(deterministic=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert heard == [False, True, True, False]


# ---- wiring into torch ----


ALONE = {"is_causal": True, "window_size": None, "softcap": None, "alibi_slopes": None, "document_ids": None}


def everything(batch: int, n_head: int, seq: int) -> dict:
    """All that attention can be asked for at once, for seq positions."""
    ids = documents(seq, *[(seq // 3, seq // 2)] * batch)
    return {"is_causal": True, "window_size": 1 + seq // 4, "softcap": 1.5, "alibi_slopes": slopes(n_head), "document_ids": ids}


@pytest.mark.parametrize(
    "meaning", [ALONE, ALONE | {"is_causal": False}, everything(1, 2, 5)], ids=["causal", "full", "everything"]
)
def test_gradients_through_the_operator(meaning):
    """Finite differences in float64, through output and log-sum-exp, with eager behind the operator."""
    torch.manual_seed(0)
    seq_q = 3 if meaning["document_ids"] is None else 5
    query, key, value = (
        torch.randn(1, h, s, 4, dtype=torch.float64, device=DEVICE, requires_grad=True) for h, s in ((2, seq_q), (1, 5), (1, 5))
    )

    def operator(*inputs):
        return attention_forward(*inputs, *Asked(0.5, **meaning), "eager")

    assert torch.autograd.gradcheck(operator, (query, key, value))
    assert torch.autograd.gradcheck(lambda *x: operator(*x)[0], (query, key, value))
    assert torch.autograd.gradcheck(lambda *x: operator(*x)[1], (query, key, value))


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("meaning", [ALONE, everything(1, 2, 7)], ids=["causal", "everything"])
def test_opcheck(rung, meaning):
    dtype = finest(rung)
    skip_unless_runs(rung, dtype, 16, **meaning)
    torch.manual_seed(0)
    query = torch.randn(1, 7, 2, 16, dtype=dtype, device=DEVICE).transpose(1, 2).requires_grad_()
    key, value = (torch.randn(1, 1, 7, 16, dtype=dtype, device=DEVICE, requires_grad=True) for _ in range(2))
    asked = (*Asked(0.25, **meaning), rung)
    torch.library.opcheck(attention_forward, (query, key, value, *asked))
    output, lse = attention_forward(query, key, value, *asked)
    saved = [x.detach() for x in (output, query, key, value, output, lse)]
    torch.library.opcheck(attention_backward, (saved[0], torch.ones_like(lse), *saved[1:], *asked))
    torch.library.opcheck(attention_backward, (saved[0], None, *saved[1:], *asked))


@pytest.mark.parametrize("rung", RUNGS)
def test_fake_tensors(rung):
    """Shapes, dtypes and strides without data or a kernel, forward and backward, as the real ones have them."""
    skip_unless_runs(rung, torch.float16, 16)

    def results() -> tuple[torch.Tensor, ...]:
        inputs = [torch.zeros(2, h, 20, 16, dtype=torch.float16, device=DEVICE, requires_grad=True) for h in (4, 2, 2)]
        output, lse = attention(*inputs, return_lse=True, backend=rung, **everything(2, 4, 20))
        return output, lse, *torch.autograd.grad((output, lse), inputs, (torch.zeros_like(output), torch.zeros_like(lse)))

    with FakeTensorMode():
        fakes = results()
    for fake, real in zip(fakes, results(), strict=True):
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (real.shape, real.stride(), real.dtype, real.device)


def block(query, key, value, backend, **meaning):
    output, lse = attention(query * 1.5, key, value, return_lse=True, backend=backend, **meaning)
    return (output * output).sum() + lse.sum()


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["causal", "everything"])
def test_compile(rung, name, dynamic):
    skip_unless_runs(rung, finest(rung), 16)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    for seq in (33, 20):
        meaning = {"is_causal": True} if name == "causal" else everything(1, 2, seq)
        inputs = [torch.randn(1, 2, seq, 16, dtype=finest(rung), device=DEVICE, requires_grad=True) for _ in range(3)]
        expected = torch.autograd.grad(block(*inputs, rung, **meaning), inputs)
        found = torch.autograd.grad(compiled(*inputs, rung, **meaning), inputs)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rung", RUNGS)
def test_one_graph_for_every_length_and_window(rung):
    skip_unless_runs(rung, finest(rung), 16)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    inputs = {seq: [torch.randn(1, 2, seq, 16, dtype=finest(rung), device=DEVICE) for _ in range(3)] for seq in (33, 20, 27)}
    compiled(*inputs[33], rung, window_size=5)
    compiled(*inputs[20], rung, window_size=7)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(*inputs[27], rung, window_size=9)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(rung, use_reentrant):
    skip_unless_runs(rung, finest(rung), 16)
    inputs = [torch.randn(1, 2, 20, 16, dtype=finest(rung), device=DEVICE, requires_grad=True) for _ in range(3)]
    meaning = everything(1, 2, 20)
    expected = torch.autograd.grad(block(*inputs, rung, **meaning), inputs)
    checkpoint(lambda *x: block(*x, rung, **meaning), *inputs, use_reentrant=use_reentrant).backward()
    for x, b in zip(inputs, expected, strict=True):
        torch.testing.assert_close(x.grad, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_the_inputs(backend):
    skip_unless_runs(backend, torch.bfloat16, 16)
    inputs = [torch.randn(1, 2, 20, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        output = attention(*inputs, is_causal=True, backend=backend)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)


@pytest.mark.parametrize("rung", RUNGS)
def test_flop_counter_agrees_with_torch(rung):
    """Two products forward and five backward, as torch counts its own attention on a GPU."""
    skip_unless_runs(rung, finest(rung), 16)
    batch, n_head, seq, head_dim = 2, 4, 32, 16
    inputs = [torch.randn(batch, n_head, seq, head_dim, dtype=finest(rung), device=DEVICE, requires_grad=True) for _ in range(3)]
    with FlopCounterMode(display=False) as counter:
        attention(*inputs, backend=rung).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * batch * n_head * seq * seq * head_dim


@pytest.mark.parametrize("rung", RUNGS)
def test_merging_the_heads_costs_no_copy(rung):
    skip_unless_runs(rung, finest(rung), 16)
    query, key, value = (torch.randn(2, 9, 3, 16, dtype=finest(rung), device=DEVICE).transpose(1, 2) for _ in range(3))
    output = attention(query, key, value, backend=rung)
    assert output.transpose(1, 2).reshape(2, 9, 48).data_ptr() == output.data_ptr()


@pytest.mark.parametrize("rung", RUNGS)
def test_a_second_derivative_is_refused(rung):
    """Uncompiled, and through the operator itself; eager has one."""
    skip_unless_runs(rung, finest(rung), 16)
    inputs = [torch.randn(1, 1, 20, 16, dtype=finest(rung), device=DEVICE, requires_grad=True) for _ in range(3)]
    for run in (
        lambda *x: attention(*x, backend=rung),
        lambda *x: attention_forward(*x, *Asked(0.25), rung)[0],
    ):
        (grad,) = torch.autograd.grad(run(*inputs).square().sum(), inputs[:1], create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative; attention's eager backend has one"):
            torch.autograd.grad(grad.sum(), inputs[:1])


def test_tensorfloat_32_by_either_of_pytorchs_switches():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert launch.precision(torch.float32, 64) == "tf32"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert launch.precision(torch.float32, 64) == "tf32x3" and launch.precision(torch.float32, 256) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_integers_stay_refused_under_autocast():
    query, key, value = (torch.zeros(1, 1, 4, 16, dtype=torch.int64, device=DEVICE) for _ in range(3))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16), pytest.raises(ValueError, match="share a floating dtype"):
        attention(query, key, value)
