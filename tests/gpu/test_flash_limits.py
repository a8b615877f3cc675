"""The flash rungs at their limits: 2³¹ elements, 65,535 heads, 131,072 positions, streams, graphs, devices, a thousand runs."""

import itertools

import pytest
import torch

from flash_ladder.kernels import attention
from flash_ladder.kernels.asked import Asked
from flash_ladder.kernels.choice import BACKENDS
from tests.helpers.reference import FLOOR, MEANINGS, NAMES, RUNGS, Case, errors, make_case, n_unlike, run, slopes

BF16 = torch.bfloat16
GRADIENTS = ("output", "dq", "dk", "dv")
each_rung = pytest.mark.parametrize("rung", RUNGS)


# ---- size ----


def test_more_than_two_to_the_31_elements():
    """Batch 5 of a tensor whose last sequence starts beyond 2³¹ elements gives what the sequence gives alone. Rung after rung."""
    seq, n_head, head_dim = 4096, 1024, 128
    for rung in RUNGS:
        query = torch.randn(1, seq, n_head, head_dim, device="cuda", dtype=BF16).expand(5, -1, -1, -1).contiguous().transpose(1, 2)
        assert query.numel() > 2**31
        inputs = [query.detach().requires_grad_() for _ in range(3)]
        output = attention(*inputs, is_causal=True, backend=rung)
        alone = [query[4:, -2:].detach().requires_grad_() for _ in range(3)]
        expected = attention(*alone, is_causal=True, backend=rung)
        assert torch.equal(output[4:, -2:], expected), rung
        grads = torch.autograd.grad(output, inputs, torch.ones_like(output))
        for a, b in zip(grads, torch.autograd.grad(expected, alone, torch.ones_like(expected)), strict=True):
            torch.testing.assert_close(a[4:, -2:], b)
        del query, inputs, output, grads, a
        torch.cuda.empty_cache()


@pytest.mark.parametrize("stride", ["batch", "head", "position"])
def test_strides_beyond_two_to_the_31(stride):
    """The last batch entry, head or position lies beyond 2³¹ elements: of the inputs and of the upstream gradient."""
    shape = {"batch": (2, 2, 70, 64), "head": (1, 2, 70, 64), "position": (1, 2, 130, 64)}[stride]
    step = {"batch": 2**31 + 64, "head": 2**31 + 64, "position": 2**24 + 2**17}[stride]
    place = {"batch": 0, "head": 1, "position": 2}[stride]
    assert (shape[place] - 1) * step > 2**31
    strides = list(torch.empty(shape, device="meta").stride())
    strides[place] = step
    if stride == "position":
        strides[1] = 64
    room = torch.empty(4, (shape[place] - 1) * step + 2**16, device="cuda", dtype=BF16)
    far = [x.as_strided(shape, strides, x.storage_offset()).normal_() for x in room]
    near = [x.contiguous() for x in far]
    for rung in RUNGS:
        results = []
        for query, key, value, grad_output in (near, far):  # near first: what was compiled for small strides must not serve these
            tensors = [x.detach().requires_grad_() for x in (query, key, value)]
            output = attention(*tensors, is_causal=True, backend=rung)
            results.append((output, *torch.autograd.grad(output, tensors, grad_output)))
        assert n_unlike(rung, *results, GRADIENTS) == 0, rung


@each_rung
def test_more_than_65535_heads(rung):
    inputs = [torch.randn(70_000, 1, 16, 16, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3)]
    output = attention(*inputs, backend=rung)
    grads = torch.autograd.grad(output.sum(), inputs)
    last = [x[-1:].detach().requires_grad_() for x in inputs]
    expected = attention(*last, backend=rung)
    found = (output[-1:], *(x[-1:] for x in grads))
    assert n_unlike(rung, found, (expected, *torch.autograd.grad(expected.sum(), last)), GRADIENTS) == 0


def in_chunks(case: Case, dtype: torch.dtype, chunk: int, **meaning) -> tuple[torch.Tensor, ...]:
    """Eager attention, `chunk` queries at a time with the keys up to the last of them: causal attention of any length."""
    rows, dk, dv = [], torch.zeros_like(case.key), torch.zeros_like(case.value)
    for start in range(0, case.query.shape[2], chunk):
        own, seen = slice(start, start + chunk), slice(0, start + chunk)
        tensors = case.query[:, :, own], case.key[:, :, seen], case.value[:, :, seen]
        part = run(Case(*tensors, case.grad_output[:, :, own], case.grad_lse[:, :, own], dtype), dtype, backend="eager", **meaning)
        rows.append([x.detach() for x in part[:3]])
        dk[:, :, seen] += part[3]
        dv[:, :, seen] += part[4]
    return *(torch.cat(x, 2) for x in zip(*rows, strict=True)), dk, dv


# flash_v1 gives a whole head to one multiprocessor, so its sequence is a quarter as long.
@pytest.mark.parametrize(("rung", "seq"), [(rung, 32_768 if rung == "flash_v1" else 131_072) for rung in RUNGS])
@pytest.mark.parametrize("window_size", [None, 5_000])
def test_long_sequences(rung, seq, window_size):
    """One head against float64 and eager attention in chunks. A window makes most tiles invisible."""
    case = make_case(1, 1, 1, seq, seq, 64, BF16)
    meaning = {"is_causal": True, "window_size": window_size}
    exact = in_chunks(case, torch.float64, 1024, **meaning)
    eager = errors(in_chunks(case, BF16, 1024, **meaning), exact)
    found = errors(run(case, BF16, backend=rung, **meaning), exact)
    for name in NAMES:
        for error, theirs in zip(found[name], eager[name], strict=True):
            assert error <= 2 * max(theirs, FLOOR[BF16] / 2), (name, found[name], eager[name])


@each_rung
def test_lse_does_not_drift_where_the_maximum_stays(rung):
    """The first tile a kernel visits, at either end, has the maximum: a factor that is nearly one would be applied once a tile.

    64 rows with scores of 40 to 72 at both ends and small ones between, in the rung's finest half precision; against float64.
    """
    seq, scale = 65_536, 0.125
    query = torch.zeros(1, 1, 64, 64, device="cuda", dtype=BF16)
    query[..., 0] = torch.linspace(20, 36, 64, device="cuda")
    key = torch.randn(1, 1, seq, 64, device="cuda", dtype=BF16) * 0.25
    key[:, :, [0, -1], 0] = 16.0
    exact = torch.logsumexp(scale * query.double() @ key.double().mT, -1)
    _, lse = attention(query, key, torch.zeros_like(key), scale=scale, return_lse=True, backend=rung)
    assert (lse - exact).abs().max() < 3e-5


@each_rung
def test_memory_grows_with_length_not_its_square(rung):
    def peak(seq: int) -> int:
        inputs = [torch.randn(1, 4, seq, 64, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(*inputs, is_causal=True, window_size=seq // 2, softcap=3.0, backend=rung).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(8192) < 4.5 * peak(2048)


# ---- time and place ----


@each_rung
@pytest.mark.parametrize("name", ["causal", "everything"])
def test_what_memory_held_before_does_not_matter(rung, name):
    """Lengths that no tile divides, with NaN in all memory that the allocator hands out."""
    case = make_case(2, 2, 1, 333, 333, 40, BF16)
    meaning = MEANINGS[name] | {"backend": rung}
    clean = run(case, BF16, **meaning)
    for _ in range(3):
        torch.cuda.empty_cache()
        room = [torch.full((n,), float("nan"), device="cuda") for n in [2**26, *[2**22] * 16, *[2**17] * 64, *[2**10] * 256]]
        del room
        assert n_unlike(rung, clean, run(case, BF16, **meaning)) == 0


@each_rung
@pytest.mark.parametrize("name", ["causal", "everything"])
def test_same_bits_a_thousand_times_under_load(rung, name):
    """Another stream keeps the GPU's multiprocessors busy, so that programs start and end in another order every time."""
    case = make_case(2, 2, 1, 500, 500, 64, BF16)
    meaning = MEANINGS[name] | {"backend": rung}
    first = run(case, BF16, **meaning)
    other, a = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda", dtype=BF16)
    b = torch.empty_like(a)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for i in range(1000):
        with torch.cuda.stream(other):
            torch.mm(a[: 64 + 64 * (i % 31)], a, out=b[: 64 + 64 * (i % 31)])
        wrong += n_unlike(rung, first, run(case, BF16, **meaning))
    assert wrong.item() == 0


@each_rung
def test_side_stream(rung):
    """Work queued before on the same stream is waited for; and the backward runs there too."""
    inputs = [torch.randn(2, 4, 512, 64, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3)]
    expected = attention(*inputs, is_causal=True, backend=rung)
    grads = torch.autograd.grad(expected.sum(), inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = []
        for x in inputs:
            y = torch.zeros_like(x)
            torch.cuda._sleep(20_000_000)
            late.append(y.copy_(x).detach().requires_grad_())
        found = attention(*late, is_causal=True, backend=rung)
        found_grads = torch.autograd.grad(found.sum(), late)
    stream.synchronize()
    assert n_unlike(rung, (expected, *grads), (found, *found_grads), GRADIENTS) == 0


@each_rung
@pytest.mark.parametrize("head_dim", [64, 128])
def test_two_streams_at_once(rung, head_dim):
    """Launches of one kernel on two streams share the GPU, and nothing else: each stream finds what it finds alone."""
    cases = [make_case(2, 8, 4, 700 + 500 * i, 700 + 500 * i, head_dim, BF16, seed=i) for i in range(2)]
    meanings = [{"is_causal": True, "backend": rung}, {"window_size": 300, "backend": rung}]
    alone = [run(case, BF16, **meaning) for case, meaning in zip(cases, meanings, strict=True)]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in cases]
    torch.cuda.synchronize()
    for _ in range(100):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                wrong[i] += n_unlike(rung, alone[i], run(cases[i], BF16, **meanings[i]))
    torch.cuda.synchronize()
    assert [x.item() for x in wrong] == [0, 0]


@each_rung
@pytest.mark.parametrize("name", ["causal", "everything"])
def test_cuda_graph(rung, name):
    module, asked = BACKENDS[rung], Asked(**MEANINGS[name] | {"scale": 0.125})
    inputs = [torch.randn(2, 2, 512, 64, device="cuda", dtype=BF16) for _ in range(3)]

    def both_ways() -> tuple[torch.Tensor, ...]:
        output, lse = module.forward(*inputs, asked)
        return output, lse, *module.backward(output, lse, *inputs, output, lse, asked)

    both_ways()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways()
    for x in inputs:
        x.normal_()
    for _ in range(2):  # a second replay finds what the first has left
        graph.replay()
        assert n_unlike(rung, captured, both_ways()) == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_rung
def test_second_device(rung):
    """While the first is the current one, and with slopes that still lie there."""
    inputs = [torch.randn(1, 2, 100, 64, device="cuda:1", dtype=BF16, requires_grad=True) for _ in range(3)]
    assert torch.cuda.current_device() == 0
    output = attention(*inputs, is_causal=True, alibi_slopes=slopes(2).to("cuda:1"), backend=rung)
    assert output.device == inputs[0].device
    output.sum().backward()
    double = [x.detach().double().requires_grad_() for x in inputs]
    exact = attention(*double, is_causal=True, alibi_slopes=slopes(2).to("cuda:1"), backend="eager")
    exact.sum().backward()
    torch.testing.assert_close(output.double(), exact, atol=2e-2, rtol=2e-2)
    for a, b in zip(inputs, double, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=5e-2, rtol=5e-2)


@each_rung
def test_many_kinds_of_input_in_turn(rung):
    """Shapes, alignments, dtypes and meanings alternate: whatever is remembered from one launch must not serve another."""
    kinds = [
        (make_case(batch, 2, 1, seq, seq, head_dim, dtype), MEANINGS[name], shift)
        for (batch, seq, head_dim), dtype, name, shift in itertools.product(
            [(1, 64, 64), (1, 65, 64), (3, 64, 40)], [torch.float16, BF16], ["full", "causal", "everything"], [0, 1]
        )
    ]
    results = []
    for _ in range(2):
        for case, meaning, shift in kinds:
            flat = [torch.cat([x.new_zeros(shift), x.flatten()])[shift:].view_as(x) for x in case.inputs(case.dtype)]
            results.append(attention(*flat, backend=rung, **meaning))
    for case_index, (case, meaning, _) in enumerate(kinds):
        exact = attention(*case.inputs(torch.float64), backend="eager", **meaning)
        for found in (results[case_index], results[case_index + len(kinds)]):
            torch.testing.assert_close(found.double(), exact, atol=3e-2, rtol=3e-2)
