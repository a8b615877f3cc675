"""flash_v2 on the GPU: real tiles, long sequences, large tensors, streams, graphs and devices.

Here is what only a GPU can show; test_attention_again.py and test_flash_v2_again.py run those of tests/ there.
"""

import pytest
import torch

from kernels import attention, choose, flash_v2
from tests.reference import check, make_case, run

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("head_dim", [16, 32, 40, 64, 80, 96, 111, 128, 160, 192, 256])
def test_head_dims(head_dim, is_causal):
    check(make_case(1, 4, 2, 700, 700, head_dim, BF16), "flash_v2", is_causal=is_causal)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (1, 4096), (127, 129), (1025, 1025), (2048, 2048), (777, 1500), (1500, 777)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lengths(seq_q, seq_k, head_dim, dtype):
    case = make_case(1, 2, 1, seq_q, seq_k, head_dim, dtype)
    if seq_k == 1:  # one key: the true gradients of query and key are those of lse alone
        case.grad_lse[:] = 10.0
    check(case, "flash_v2", is_causal=True)


@pytest.mark.parametrize("seed", range(5))
def test_seeds(seed):
    check(make_case(2, 8, 2, 1000, 1000, 128, BF16, seed=seed), "flash_v2", is_causal=True)


@pytest.mark.parametrize("size", [5.0, 20.0])
def test_large_logits(size):
    check(make_case(1, 2, 2, 500, 500, 64, BF16, size=size), "flash_v2", is_causal=True)


def test_float32():
    check(make_case(1, 2, 1, 300, 300, 64, FP32), "flash_v2", is_causal=True)


def test_more_than_two_to_the_31_elements():
    """Batch 5 of a tensor whose last sequence starts beyond 2³¹ elements gives what the sequence gives alone."""
    seq, n_head, head_dim = 4096, 1024, 128
    query = torch.randn(1, seq, n_head, head_dim, device="cuda", dtype=BF16).expand(5, -1, -1, -1).contiguous().transpose(1, 2)
    assert query.numel() > 2**31
    query.requires_grad_()
    output = attention(query, query, query, is_causal=True, backend="flash_v2")
    alone = query[4:].detach()[:, -2:].requires_grad_()
    expected = attention(alone, alone, alone, is_causal=True, backend="flash_v2")
    assert torch.equal(output[4:, -2:], expected)
    output.backward(torch.ones_like(output))
    expected.backward(torch.ones_like(expected))
    torch.testing.assert_close(query.grad[4:, -2:], alone.grad)


def test_more_than_65535_heads():
    inputs = [torch.randn(70_000, 1, 16, 16, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3)]
    output = attention(*inputs, backend="flash_v2")
    grads = torch.autograd.grad(output.sum(), inputs)
    last = [x[-1:].detach().requires_grad_() for x in inputs]
    expected = attention(*last, backend="flash_v2")
    assert torch.equal(output[-1:], expected)
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), last), strict=True):
        assert torch.equal(a[-1:], b)


def test_same_bits_a_hundred_times():
    case = make_case(4, 8, 4, 1024, 1024, 64, BF16)
    first = run(case, BF16, backend="flash_v2", is_causal=True)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run(case, BF16, backend="flash_v2", is_causal=True), strict=True))


def test_side_stream():
    inputs = [torch.randn(2, 4, 512, 64, device="cuda", dtype=BF16) for _ in range(3)]
    expected = attention(*inputs, is_causal=True, backend="flash_v2")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = attention(*inputs, is_causal=True, backend="flash_v2")
    stream.synchronize()
    assert torch.equal(found, expected)


def test_cuda_graph():
    inputs = [torch.randn(2, 4, 512, 64, device="cuda", dtype=BF16) for _ in range(3)]
    output, lse = flash_v2.forward(*inputs, scale=0.125, is_causal=True)
    flash_v2.backward(output, None, *inputs, output, lse, scale=0.125, is_causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, lse = flash_v2.forward(*inputs, scale=0.125, is_causal=True)
        grads = flash_v2.backward(output, None, *inputs, output, lse, scale=0.125, is_causal=True)
    for x in inputs:
        x.normal_()
    graph.replay()
    expected, lse = flash_v2.forward(*inputs, scale=0.125, is_causal=True)
    assert torch.equal(output, expected)
    for a, b in zip(grads, flash_v2.backward(expected, None, *inputs, expected, lse, scale=0.125, is_causal=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    inputs = [torch.randn(1, 2, 100, 64, device="cuda:1", dtype=BF16, requires_grad=True) for _ in range(3)]
    output = attention(*inputs, is_causal=True, backend="flash_v2")
    assert output.device == inputs[0].device
    output.sum().backward()
    eager = attention(*(x.detach().double() for x in inputs), is_causal=True, backend="eager")
    torch.testing.assert_close(output.double(), eager, atol=2e-2, rtol=2e-2)


def test_auto_takes_it_from_ampere_on():
    device = torch.device("cuda")
    expected = "flash_v2" if torch.cuda.get_device_capability() >= (8, 0) else "sdpa"
    assert choose(device, BF16, 64).backend == expected


def test_memory_grows_with_length_not_its_square():
    def peak(seq: int) -> int:
        inputs = [torch.randn(1, 4, seq, 64, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(*inputs, is_causal=True, backend="flash_v2").sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(8192) < 4.5 * peak(2048)
