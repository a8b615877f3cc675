"""The split of Turing's matrix products (kernels/turing.py), run on a GPU that is newer: its mma of depth 8 is Turing's."""

import pytest
import torch

from flash_ladder.kernels.turing import DEPTH_8, DEPTH_16, lowered_as_ampere
from tests.kernels.test_turing import PLAIN, matmul_kernel


@pytest.fixture
def target():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        pytest.skip("a check for GPUs newer than Turing")
    return 10 * major + minor


def multiply(a, b, target, block_k):
    """a b in float32, and the PTX that made it."""
    (m, depth), n = a.shape, b.shape[1]
    c = torch.full((m, n), float("nan"), device=a.device)
    with lowered_as_ampere(target) as options:
        kernel = matmul_kernel[(m // 64, n // 64)](
            a, b, c, depth, a.stride(0), b.stride(0), c.stride(0), BLOCK_M=64, BLOCK_N=64, BLOCK_K=block_k, **PLAIN, **options
        )
    return c, kernel.asm["ptx"]


@pytest.mark.parametrize("block_k", [16, 32, 64])
@pytest.mark.parametrize("shape", [(64, 64, 16), (64, 128, 64), (128, 64, 40), (192, 256, 1024)])
def test_products_in_two_halves(target, shape, block_k):
    """Small integers, whose sums float32 holds exactly, to the bit; others to what summing in float32 rounds away."""
    m, n, depth = shape
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randint(-8, 9, size, device="cuda", generator=generator).half() for size in ((m, depth), (depth, n)))
    c, ptx = multiply(a, b, target, block_k)
    assert DEPTH_8 in ptx and DEPTH_16 not in ptx and "wgmma" not in ptx and "tcgen05" not in ptx
    assert torch.equal(c.double(), a.double() @ b.double())

    a, b = (torch.randn(size, device="cuda", generator=generator).half() for size in ((m, depth), (depth, n)))
    c, _ = multiply(a, b, target, block_k)
    limit = depth * 2.0**-23 * (a.double().abs() @ b.double().abs())
    assert ((c.double() - a.double() @ b.double()).abs() <= limit).all()
