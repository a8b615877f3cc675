"""The yardstick of every kernel test: float64 attention and how far a result lies from it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("output", "lse", "dq", "dk", "dv")


@dataclass
class Case:
    """Inputs, exactly representable in `dtype`, and the upstream gradients of output and log-sum-exp."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_output: Tensor
    grad_lse: Tensor
    dtype: torch.dtype

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        return [x.to(dtype) for x in (self.query, self.key, self.value)]


def make_case(batch, n_head, n_kv_head, seq_q, seq_k, head_dim, dtype, *, seed=0, size=1.0) -> Case:
    """Random normal inputs; `size` scales query and key."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    query = (size * normal(batch, n_head, seq_q, head_dim)).to(dtype).double()
    key = (size * normal(batch, n_kv_head, seq_k, head_dim)).to(dtype).double()
    value = normal(batch, n_kv_head, seq_k, head_dim).to(dtype).double()
    grad_output = normal(batch, n_head, seq_q, head_dim).to(dtype).double()
    return Case(query, key, value, grad_output, normal(batch, n_head, seq_q).float().double(), dtype)


def run(case: Case, dtype: torch.dtype, **meaning) -> tuple[Tensor, ...]:
    """Output, lse, dq, dk, dv of one backend in one dtype."""
    inputs = [x.requires_grad_() for x in case.inputs(dtype)]
    output, lse = attention(*inputs, return_lse=True, **meaning)
    grads = torch.autograd.grad((output, lse), inputs, (case.grad_output.to(output.dtype), case.grad_lse.to(lse.dtype)))
    return output, lse, *grads


def error(result: Tensor, exact: Tensor) -> float:
    """Root-mean-square error over the root-mean-square of the exact values; infinities must stand in the same places."""
    result, exact = result.detach().double(), exact.detach().double()
    assert not result.isnan().any(), "NaN in the result"
    assert torch.equal(result.isinf(), exact.isinf()), "infinities differ"
    finite = exact.isfinite()
    scale = exact[finite].pow(2).mean().sqrt() if finite.any() else torch.tensor(1.0)
    difference = (result - exact)[finite].pow(2).mean().sqrt() if finite.any() else torch.tensor(0.0)
    return (difference / scale.clamp_min(1e-30)).item()


def errors(results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    return {name: error(a, b) for name, a, b in zip(NAMES, results, exact, strict=True)}


FLOOR = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 5e-7}  # one rounding of the output, and a little


def check(case: Case, backend: str, *, factor: float = 2.0, **meaning) -> None:
    """Asserts that `backend` is within `factor` of what eager attention loses in the same precision, for all five results.

    On a GPU gradients may instead be off by eager's error plus what p = exp(s - lse) inherits there: the hardware's exponential,
    taken to be right to two units in the last place (2^-22), and the rounding of the stored float32 lse. Only float32 notices.
    """
    exact = run(case, torch.float64, backend="eager", **meaning)
    eager = errors(run(case, case.dtype, backend="eager", **meaning), exact)
    found = errors(run(case, case.dtype, backend=backend, **meaning), exact)
    lse = exact[1][exact[1].isfinite()].abs()
    inherited = 2**-22 + 2**-24 * lse.max().item() if DEVICE.type == "cuda" and lse.numel() else 0.0
    for name in NAMES:
        allowed = factor * max(eager[name], FLOOR[case.dtype] / 2)
        if name in ("dq", "dk", "dv"):
            allowed = max(allowed, eager[name] + inherited)
        assert found[name] <= allowed, f"{name}: rms error {found[name]:.2e}, eager has {eager[name]:.2e}"
