"""What only flash_v3 has: barriers that could hang, a dq that is added up in memory, launches remembered for all sizes of a kind.

What every rung must do is in test_flash.py, test_flash_limits.py and the tests that run here again.
"""

import itertools
import subprocess
import sys
import time

import pytest
import torch

from flash_ladder.kernels import attention, choose
from flash_ladder.kernels.asked import Asked
from flash_ladder.kernels.flash_v3 import launch as flash_v3
from tests.helpers.reference import HOPPER, MEANINGS, NAMES, check, documents, make_case, n_unlike, run

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(not HOPPER, reason="flash_v3 needs a Hopper GPU")


def repeat(head_dim: int, deterministic: bool, times: int = 1000) -> int:
    """How many elements of output, lse and gradients differ from the first run's in `times` runs of 64 heads of 4,096 positions.

    Another stream keeps some multiprocessors busy, so that blocks start and end in another order every time.
    """
    inputs = [torch.randn(4, 16, 4096, head_dim, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3)]
    upstream = torch.randn_like(inputs[0]), torch.randn(4, 16, 4096, device="cuda")

    def results(backend: str) -> tuple[torch.Tensor, ...]:
        output, lse = attention(*inputs, is_causal=True, return_lse=True, deterministic=deterministic, backend=backend)
        return output, lse, *torch.autograd.grad((output, lse), inputs, upstream)

    first = results("flash_v3")
    for name, a, b in zip(NAMES, first, results("flash_v2"), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2 * b.abs().max().item(), rtol=2e-2, msg=name)
    other, a = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda", dtype=BF16)
    b = torch.empty_like(a)
    unlike = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for i in range(times):
        with torch.cuda.stream(other):
            torch.mm(a[: 64 + 64 * (i % 31)], a, out=b[: 64 + 64 * (i % 31)])
        unlike += n_unlike("flash_v3", first, results("flash_v3"), deterministic=deterministic)
    return int(unlike.item())


@pytest.mark.parametrize("order", ["any-order", "deterministic"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_thousand_times_without_a_hang_or_a_race(head_dim, order):
    """In a process of its own, which can be ended: a barrier that nobody arrives at would wait for ever."""
    command = [sys.executable, "-m", "tests.gpu.test_flash_v3", str(head_dim), order]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.split() == ["unlike", "0"]


def unsorted_documents() -> None:
    """Forward and backward with document_ids that break their contract, as padding at the end with an earlier number does."""
    for seq, is_causal in itertools.product((100, 333, 700), (True, False)):
        ids = torch.arange(seq, device="cuda", dtype=torch.int32) // 90
        for moved in (30, 64, 130):
            inputs = [torch.randn(1, 2, seq, 64, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3)]
            for deterministic in (False, True):
                asked = {"is_causal": is_causal, "document_ids": ids.roll(moved)[None], "deterministic": deterministic}
                torch.autograd.grad(attention(*inputs, backend="flash_v3", **asked).sum(), inputs)
    torch.cuda.synchronize()


def test_unsorted_documents_end():
    """They give wrong results, as everywhere; what they must not do here is to leave a warpgroup waiting for ever."""
    command = [sys.executable, "-c", "from tests.gpu.test_flash_v3 import unsorted_documents as run; run()"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("head_dim", "seq"), [(40, 300), (64, 2100), (128, 300), (192, 300), (256, 70)])
def test_float32_output(head_dim, seq, is_causal):
    """What is rounded for a half-precision output, unrounded, by every setting."""
    case = make_case(1, 2, 1, seq, seq, head_dim, BF16)
    exact = run(case, torch.float64, backend="eager", is_causal=is_causal)[0]
    asked = Asked(head_dim**-0.5, is_causal=is_causal)
    output, lse = flash_v3.forward(*case.inputs(BF16), asked, output_dtype=torch.float32)
    rounded, same = flash_v3.forward(*case.inputs(BF16), asked)
    assert output.dtype == torch.float32 and torch.equal(output.to(BF16), rounded) and torch.equal(lse, same)
    assert (output - exact).norm() < (rounded - exact).norm()


@pytest.mark.parametrize("name", ["causal", "everything"])
def test_float32_output_in_the_backward(name):
    """Outputs merged from several forwards are float32; the launch remembered for half precision must not serve them."""
    case = make_case(1, 2, 1, 300, 300, 64, BF16)
    query, key, value = case.inputs(BF16)
    asked = Asked(**MEANINGS[name] | {"scale": 0.125})
    output, lse = flash_v3.forward(query, key, value, asked)
    grads = []
    for dtype in (BF16, torch.float32, BF16):
        upstream = case.grad_output.to(BF16).to(dtype), case.grad_lse.float()
        grads.append(flash_v3.backward(*upstream, query, key, value, output.to(dtype), lse, asked))
        assert all(x.dtype == BF16 for x in grads[-1])
        assert n_unlike("flash_v3", grads[0], grads[-1], ("dq", "dk", "dv")) == 0


@pytest.mark.parametrize("rows", ["all", "few"])
@pytest.mark.parametrize("size", [3.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("is_causal", [True, False])
def test_scores_that_rise(is_causal, head_dim, dtype, size, rows):
    """Blocks are walked from the last keys to the first. Of each, scores lie above what the maximum so far allows for: by more than
    2^14 or, at 40, by more than float32 can hold; in every row, or in a few of which a warp may have one."""
    seq = 700
    case = make_case(1, 2, 1, seq, seq, head_dim, dtype)
    blocks_to_come = (seq - 1) // 128 - torch.arange(seq, device="cuda") // 128
    case.key = (case.key * (1 + size * blocks_to_come)[:, None]).to(dtype).double()
    if rows == "few":
        small = torch.arange(seq, device="cuda") % 37 != 5
        case.query = torch.where(small[:, None], 0.01 * case.query, case.query).to(dtype).double()
    check(case, "flash_v3", is_causal=is_causal)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", MEANINGS)
def test_deterministic_gradients(name, head_dim):
    """As exact as those in any order, and the same bits every time, for grouped heads and lengths that end within a tile."""
    assert choose(torch.device("cuda"), BF16, head_dim, features=frozenset({"deterministic"})).backend == "flash_v3"
    for seq_q, seq_k in [(1000, 1000), (300, 1100), (1100, 300)]:
        case = make_case(2, 2, 1, seq_q, seq_k, head_dim, BF16)
        asked = MEANINGS[name] | {"deterministic": True}
        check(case, "flash_v3", **asked)
        first = run(case, BF16, backend="flash_v3", **asked)
        for _ in range(10):
            assert n_unlike("flash_v3", first, run(case, BF16, backend="flash_v3", **asked), deterministic=True) == 0


def test_deterministic_gradients_of_documents():
    """Sorted, of lengths from one position to several blocks of keys."""
    ids = documents(1000, (1, 2, 130, 700), (64, 128, 900, 999))
    for head_dim, is_causal in itertools.product((64, 128, 256), (True, False)):
        case = make_case(2, 2, 1, 1000, 1000, head_dim, BF16)
        asked = {"is_causal": is_causal, "document_ids": ids, "deterministic": True}
        check(case, "flash_v3", **asked)
        first = run(case, BF16, backend="flash_v3", **asked)
        for _ in range(10):
            assert n_unlike("flash_v3", first, run(case, BF16, backend="flash_v3", **asked), deterministic=True) == 0


def more_blocks_than_fit() -> None:
    """Deterministic gradients with a launch of four blocks for each multiprocessor, of which one fits at a time."""
    real = flash_v3.multiprocessors
    flash_v3.multiprocessors = lambda device: 4 * real(device)
    for is_causal in (True, False):
        inputs = [torch.randn(2, 16, 8192, 64, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3)]
        output = attention(*inputs, is_causal=is_causal, deterministic=True, backend="flash_v3")
        torch.autograd.grad(output.sum(), inputs)
    torch.cuda.synchronize()


def test_blocks_that_cannot_start_keep_nobody_waiting():
    """As where another kernel holds multiprocessors: a block waits only for tiles of blocks that have started."""
    command = [sys.executable, "-c", "from tests.gpu.test_flash_v3 import more_blocks_than_fit as run; run()"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-4000:]


def test_pytorchs_switch_makes_gradients_deterministic():
    case = make_case(1, 4, 4, 2000, 2000, 64, BF16)
    in_order = run(case, BF16, is_causal=True, deterministic=True, backend="flash_v3")
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(10):
            found = run(case, BF16, is_causal=True, backend="flash_v3")
            assert n_unlike("flash_v3", in_order, found, deterministic=True) == 0
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_call_waits_for_nothing():
    """The host queues forward and backward and goes on: nothing is read back from the GPU."""
    inputs = [torch.randn(1, 4, 512, 64, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3)]
    upstream = torch.randn_like(inputs[0])
    for busy in (False, True):
        torch.cuda.synchronize()
        if busy:
            torch.cuda._sleep(2_000_000_000)  # a second and more
        start = time.perf_counter()
        torch.autograd.grad(attention(*inputs, is_causal=True, backend="flash_v3"), inputs, upstream)
        queued = time.perf_counter() - start
    torch.cuda.synchronize()
    assert queued < 0.5


if __name__ == "__main__":
    print("unlike", repeat(int(sys.argv[1]), sys.argv[2] == "deterministic"))
