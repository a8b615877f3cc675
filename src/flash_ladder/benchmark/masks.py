"""Whether time follows the visible area: attention under a window or packed documents, beside the same call without them.

One causal sequence, as many key/value heads as query heads. A kernel that skips the masked tiles takes the visible area's share of
its dense time. A kernel that computes and then hides them takes all of that time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from flash_ladder.benchmark.result import Masked, Panel
from flash_ladder.benchmark.timing import attend_with, backward_milliseconds, failure_note, forward_milliseconds, random_inputs
from flash_ladder.kernels import BACKENDS
from flash_ladder.kernels.asked import Asked
from flash_ladder.kernels.bounds import key_bounds
from flash_ladder.names import PEERS
from flash_ladder.script_schema import CompleteBenchmark, split_mask


def measure_masks(cfg: CompleteBenchmark, device: torch.device, next_is: Callable[[str], None]) -> Iterator[Masked]:
    """Every mask of cfg.masks on every backend that takes masks, for every head_dim, each as soon as it is measured.

    It tells `next_is` what comes next. On a CPU it measures nothing, since a CPU's times would say nothing about a GPU.
    """
    if device.type == "cpu" or not cfg.masks:
        return
    for head_dim in cfg.head_dim:
        for backend in with_masks(cfg.backends):
            next_is(f"{backend} without a mask, D={head_dim}")
            dense = measure_times(cfg, backend, head_dim, {}, device)
            for name in cfg.masks:
                next_is(f"{backend} under {name}, D={head_dim}")
                yield measure_mask(cfg, backend, head_dim, name, dense, device)


def with_masks(backends: list[str]) -> list[str]:
    """The backends that take a window and documents: this repository's, which refuse what they cannot do, and some peers."""
    return [backend for backend in backends if backend in BACKENDS or PEERS[backend].takes_masks]


# ---- a mask ----


def mask_arguments(name: str, seq_len: int, device: torch.device) -> dict[str, Any]:
    """The arguments of `attention` that a mask's name stands for: a window_size, or document_ids int32 [1, S].

    documents_N: documents of N tokens each, the last one of the rest. ragged_N: S / N documents, rounded, cut at random.
    """
    kind, length = split_mask(name)
    length = min(length, seq_len)  # a longer window hides no more
    if kind == "window":
        return {"window_size": length}
    position = torch.arange(seq_len, dtype=torch.int32)
    if kind == "documents":
        ids = position // length
    else:
        n_cuts = max(1, round(seq_len / length)) - 1
        starts = 1 + torch.randperm(seq_len - 1, generator=torch.Generator().manual_seed(0))[:n_cuts]
        ids = torch.zeros_like(position).index_fill(0, starts, 1).cumsum(0, dtype=torch.int32)
    return {"document_ids": ids[None].to(device)}


def visible_pairs(seq_len: int, arguments: dict[str, Any], device: torch.device) -> int:
    """The number of pairs of a query and a key that it sees under causality and the mask."""
    lo, hi = key_bounds(Asked(1.0, is_causal=True, **arguments), seq_len, seq_len, device)
    return int((hi - lo + 1).sum())  # under causality every query sees itself at least


# ---- its time ----


@dataclass
class Times:
    """Median milliseconds of one backend; None where it was not timed, `note` says why."""

    forward: float | None = None
    backward: float | None = None
    note: str = ""


def measure_times(cfg: CompleteBenchmark, backend: str, head_dim: int, arguments: dict[str, Any], device: torch.device) -> Times:
    """Times forward and backward of one sequence of cfg.mask_seq_len tokens. A refusal or a lack of memory is a result."""
    times = Times()

    def work() -> None:
        attend = attend_with(backend, True, cfg.mask_seq_len, device, arguments)
        inputs, grad_output = random_inputs(cfg, Panel(True, head_dim, None), 1, cfg.mask_seq_len, device)
        times.forward = forward_milliseconds(attend, inputs, cfg.milliseconds)
        times.backward = backward_milliseconds(attend, inputs, grad_output, cfg.milliseconds)

    times.note = failure_note(work)
    return times


def measure_mask(cfg: CompleteBenchmark, backend: str, head_dim: int, name: str, dense: Times, device: torch.device) -> Masked:
    """One backend under one mask, beside its dense times."""
    arguments = mask_arguments(name, cfg.mask_seq_len, device)
    area = visible_pairs(cfg.mask_seq_len, arguments, device) / visible_pairs(cfg.mask_seq_len, {}, device)
    if dense.forward is None:  # nothing to compare with
        return Masked(name, backend, head_dim, cfg.mask_seq_len, area, note=f"without the mask: {dense.note}")
    times = measure_times(cfg, backend, head_dim, arguments, device)
    note = times.note or (dense.note and f"without the mask: {dense.note}")
    return Masked(
        name, backend, head_dim, cfg.mask_seq_len, area, times.forward, times.backward, dense.forward, dense.backward, note
    )
