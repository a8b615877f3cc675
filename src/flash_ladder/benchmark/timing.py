"""One call of attention as the benchmark makes it: the backend, the inputs, the time, and the note of a failure."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from flash_ladder.benchmark.peers import Attend, NotInstalled, one_line, peer
from flash_ladder.benchmark.result import Panel
from flash_ladder.kernels import Unsupported, attention
from flash_ladder.names import PEERS
from flash_ladder.script_schema import CompleteBenchmark

L2_FLUSH_BYTES = 256 * 2**20  # beyond any GPU's L2 cache
FLUSHES = 8  # half a millisecond on an H200, in which the host queues the call; the host's own time is measured apart

T = TypeVar("T")


def attend_with(backend: str, is_causal: bool, seq_len: int, device: torch.device, mask: Mapping[str, Any] | None = None) -> Attend:
    """A backend of this repository, or a peer, as a function of query, key and value. Raises NotInstalled.

    mask: a causal mask as an argument of `attention`, a window_size or document_ids [1, S].
    """
    if backend in PEERS:
        return peer(backend, is_causal=is_causal, seq_len=seq_len, device=device, **(mask or {}))
    return lambda query, key, value: attention(query, key, value, is_causal=is_causal, backend=backend, **(mask or {}))


def random_inputs(
    cfg: CompleteBenchmark, panel: Panel, batch: int, seq_len: int, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, which require gradients, and the output's gradient: [B, H, S, D], random normal, seeded."""
    n_head = cfg.width // panel.head_dim
    generator = torch.Generator(device).manual_seed(0)
    heads = (n_head, panel.n_kv_head or n_head, panel.n_kv_head or n_head, n_head)
    query, key, value, grad_output = (
        torch.randn(batch, h, seq_len, panel.head_dim, device=device, dtype=getattr(torch, cfg.dtype), generator=generator)
        for h in heads
    )
    return [x.requires_grad_() for x in (query, key, value)], grad_output


class NoBackward(Exception):
    """The backend has only a forward; the message says so."""


def gradients(output: Tensor, inputs: list[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """The gradients of query, key and value. Raises NoBackward; some packages tell only when called that they have no backward."""
    if not output.requires_grad:
        raise NoBackward("no backward")
    try:
        return torch.autograd.grad(output, inputs, grad_output)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NoBackward(f"no backward: {one_line(error)}") from None


def failure_note(work: Callable[[], None]) -> str:
    """Does `work`; returns "" where it succeeds, and one line that says why where it fails.

    Every error becomes a note, since a kernel that fails on one shape must not cost the other figures. The error itself is not
    passed on, because its traceback would keep the failed call's tensors. So their memory is free again on return.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PyTorch's many lines on why it passed over a kernel
            work()
        note = ""
    except (torch.OutOfMemoryError, MemoryError) as error:
        note = "out of memory" + (f": {error}" if isinstance(error, MemoryError) else "")
    except (NotInstalled, NoBackward) as error:
        note = str(error)
    except Unsupported as error:
        note = f"refused: {error}"
    except Exception as error:
        note = f"failed: {one_line(error)}"
    if note:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return note


def forward_milliseconds(attend: Attend, inputs: list[Tensor], budget: float) -> float:
    """Median milliseconds of a forward pass that saves nothing for a backward, over about `budget` milliseconds of calls."""
    with torch.no_grad():
        return median_milliseconds(lambda: None, lambda _: attend(*inputs), budget)


def backward_milliseconds(attend: Attend, inputs: list[Tensor], grad_output: Tensor, budget: float) -> float:
    """Median milliseconds of a backward pass alone, over about `budget` milliseconds of calls; raises NoBackward."""
    return median_milliseconds(lambda: attend(*inputs), lambda output: gradients(output, inputs, grad_output), budget)


def median_milliseconds(prepare: Callable[[], T], call: Callable[[T], object], budget: float) -> float:
    """Median milliseconds of call(prepare()) on the GPU, `prepare` not timed, over about `budget` milliseconds of calls.

    A backward pass is timed on a new graph each time: compiled ones (FlexAttention) free what they saved and cannot run twice.
    """
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def timed(repeats: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            prepared = prepare()
            for _ in range(FLUSHES):
                flush.zero_()
            start.record()
            call(prepared)
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    timed(1)  # compiles
    (first,) = timed(1)
    if first > budget:  # a call this long hardly varies
        return median([first, *timed(2)])
    estimate = median(timed(5))
    return median(timed(max(5, min(1000, int(budget / max(estimate, 1e-3))))))
