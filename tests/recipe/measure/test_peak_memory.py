"""The meter of memory on known allocations: what is held at once, inside an operation too, and nothing from before."""

import torch

from flash_ladder.kernels import attention
from flash_ladder.measure.peak_memory import peak_bytes

CPU = torch.device("cpu")
MIB = 2**20


def mebibytes(n: int) -> torch.Tensor:
    return torch.empty(n * MIB, dtype=torch.uint8)


def test_what_is_held_at_once():
    def call():
        first = mebibytes(3)
        second = mebibytes(4)
        del first
        third = mebibytes(2)
        return second, third

    assert peak_bytes(call, CPU) == 7 * MIB


def test_what_is_returned_counts():
    assert peak_bytes(lambda: [mebibytes(1) for _ in range(5)], CPU) == 5 * MIB


@torch.library.custom_op("flash_ladder_test::scratch", mutates_args=())
def scratch(x: torch.Tensor) -> torch.Tensor:
    """An operation that needs 6 MiB inside."""
    held = mebibytes(6)
    return x + held[:1].sum() * 0


def test_inside_an_operation():
    x = torch.zeros(16)
    assert 6 * MIB <= peak_bytes(lambda: scratch(x), CPU) < 6 * MIB + 1024


def test_a_release_of_what_was_there_before():
    held = []
    peak_bytes(lambda: held.append(mebibytes(8)), CPU)  # the profiler knows of blocks that it saw allocated in any of its runs

    def call():
        held.clear()
        return mebibytes(2)

    assert peak_bytes(call, CPU) == 2 * MIB


def test_eager_attention_holds_its_scores_and_a_rung_does_not():
    inputs = [torch.randn(1, 2, 256, 32, requires_grad=True) for _ in range(3)]

    def bytes_of(backend: str) -> int:
        def call():
            output = attention(*inputs, backend=backend)
            torch.autograd.grad(output, inputs, torch.ones_like(output))

        return peak_bytes(call, CPU)

    scores, tensor = 2 * 256 * 256 * 4, 2 * 256 * 32 * 4
    assert bytes_of("eager") > 2 * scores
    assert 4 * tensor < bytes_of("flash_v2") < 6 * tensor + scores / 4  # output and three gradients, and little else
