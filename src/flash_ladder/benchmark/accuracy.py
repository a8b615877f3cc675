"""The error of a backend's output and gradients against float64 eager attention, on one sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_ladder.benchmark.result import GRADIENTS, Error, Panel
from flash_ladder.benchmark.timing import attend_with, failure_note, gradients, random_inputs
from flash_ladder.script_schema import CompleteBenchmark


@dataclass(frozen=True)
class Yardstick:
    """Inputs in the benchmark's dtype, and the float64 eager results for them; `note` says why there are none."""

    inputs: list[Tensor]
    grad_output: Tensor
    exact: tuple[Tensor, ...]  # output, dq, dk, dv
    note: str


def yardstick(cfg: CompleteBenchmark, panel: Panel, device: torch.device) -> Yardstick:
    """One sequence of cfg.error_seq_len tokens in float64.

    One sequence of bounded length, because the float64 scores of a long one fit nowhere.
    """
    inputs, grad_output = random_inputs(cfg, panel, 1, cfg.error_seq_len, device)
    exact: list[Tensor] = []

    def work() -> None:
        wide = [x.detach().double().requires_grad_() for x in inputs]
        output = attend_with("eager", panel.causal, cfg.error_seq_len, device)(*wide)
        exact.extend([output.detach(), *torch.autograd.grad(output, wide, grad_output.double())])

    note = failure_note(work)
    return Yardstick(inputs, grad_output, tuple(exact), note and f"no float64 to compare with: {note}")


def measure_error(cfg: CompleteBenchmark, backend: str, panel: Panel, right: Yardstick, device: torch.device) -> Error:
    """The backend's output and gradients beside float64's."""
    error = Error(backend, panel.head_dim, panel.causal, panel.n_kv_head, note=right.note)
    if right.note:
        return error

    def work() -> None:
        output = attend_with(backend, panel.causal, cfg.error_seq_len, device)(*right.inputs)
        error.output = relative_error(output, right.exact[0])
        grads = gradients(output, right.inputs, right.grad_output)
        for name, grad, exact in zip(GRADIENTS, grads, right.exact[1:], strict=True):
            setattr(error, name, relative_error(grad, exact))

    error.note = failure_note(work)
    return error


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over the root mean square of the exact values; nan where there is a NaN."""
    return ((found.detach().double() - exact).pow(2).mean() / exact.pow(2).mean()).sqrt().item()
