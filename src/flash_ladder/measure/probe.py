"""What the chosen attention saves: measures one layer at the run's real shape, beside eager attention, once before training.

Eager attention stores a score for every pair of positions, so its memory grows with the square of seq_len; every other backend
grows with seq_len. On a GPU the memory is the allocator's peak over a forward and a backward pass, less the inputs. A CPU keeps
no such count; there the memory is what autograd holds between the two passes, which includes eager's scores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from flash_ladder.kernels import attention
from flash_ladder.kernels.generations import dtype_name
from flash_ladder.memory import free_memory
from flash_ladder.names import is_kernel
from flash_ladder.units import size

REPEATS = 5


@dataclass(frozen=True)
class Layer:
    """One attention layer's inputs: query [B, H, S, D], key and value [B, K, S, D], causal, as views of [B, S, heads, D]."""

    batch_size: int
    n_head: int
    n_kv_head: int
    seq_len: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    document_ids: bool = False
    window_size: int | None = None
    softcap: float | None = None
    alibi: bool = False

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random query, key and value that require gradients."""
        shapes = ((self.batch_size, self.seq_len, heads, self.head_dim) for heads in (self.n_head, self.n_kv_head, self.n_kv_head))
        q, k, v = (torch.randn(s, dtype=self.dtype, device=self.device).transpose(1, 2).requires_grad_() for s in shapes)
        return q, k, v

    @property
    def score_bytes(self) -> int:
        """The fewest bytes that eager attention keeps for its backward: its softmax in float32 and, where narrower, in `dtype`."""
        wide = 4 + (self.dtype.itemsize if self.dtype.itemsize < 4 else 0)
        return self.batch_size * self.n_head * self.seq_len**2 * wide

    def __str__(self) -> str:
        kv = f"/{self.n_kv_head}" if self.n_kv_head != self.n_head else ""
        dtype = dtype_name(self.dtype)
        window = "" if self.window_size is None else f" in a window of {self.window_size}"
        return (
            f"batch {self.batch_size}, {self.n_head}{kv} heads, {self.seq_len} positions{window}, head_dim {self.head_dim}, {dtype}"
        )


@dataclass(frozen=True)
class Probe:
    """One layer on the chosen backend and on eager: bytes, and seconds for forward and backward (None: not measured)."""

    layer: Layer
    backend: str
    bytes: int
    seconds: float | None
    eager_bytes: int
    eager_seconds: float | None
    eager_is_analytic: bool  # eager does not fit here; its bytes are Layer.score_bytes, a lower bound

    def __str__(self) -> str:
        what = "peaks at" if self.layer.device.type == "cuda" else "keeps"
        memory = f"{self.backend} {what} {size(self.bytes)}"
        clock = "time not compared, as Triton's interpreter runs it here"
        if self.seconds is not None:
            clock = f"{self.seconds * 1e3:.3g} ms forward and backward"
        if self.backend == "eager":
            return f"one layer ({self.layer}): {memory}; {clock}"
        ratio = f"{self.eager_bytes / self.bytes:.1f} times as much"
        if self.eager_is_analytic:
            memory += f", eager at least {size(self.eager_bytes)}, {ratio}, and does not fit here"
        else:
            memory += f", eager {size(self.eager_bytes)}, {ratio}"
        if self.seconds is not None and self.eager_seconds is not None:
            clock += f", eager {self.eager_seconds * 1e3:.3g} ms, {self.eager_seconds / self.seconds:.1f} times as long"
        return f"one layer ({self.layer}): {memory}; {clock}"


def probe_attention(layer: Layer, backend: str) -> Probe:
    """Measures `layer` with `backend` and with eager."""
    measure = measure_on_gpu if layer.device.type == "cuda" else measure_on_cpu
    n_bytes, seconds = measure(layer, backend)
    eager_bytes, eager_seconds, analytic = layer.score_bytes, None, True
    if backend == "eager":
        eager_bytes, eager_seconds, analytic = n_bytes, seconds, False
    elif eager_may_fit(layer):
        try:
            eager_bytes, eager_seconds = measure(layer, "eager")
            analytic = False
        except torch.cuda.OutOfMemoryError:
            pass  # the memory is freed outside the handler, whose traceback holds the tensors
    if layer.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(layer.device)
    return Probe(layer, backend, n_bytes, seconds, eager_bytes, eager_seconds, analytic)


def eager_may_fit(layer: Layer) -> bool:
    """Whether trying eager is reasonable: its scores alone take at most 80 % of a GPU's free memory.

    On a CPU the limit is a fifth of the free memory: its passes hold several such arrays, and a process that runs out is killed.
    """
    if layer.device.type == "cuda":
        return layer.score_bytes < 0.8 * torch.cuda.mem_get_info(layer.device)[0]
    return layer.score_bytes < 0.2 * free_memory()


def document_ids(layer: Layer) -> Tensor | None:
    """Rows cut into four documents, where the run keeps attention inside a document."""
    if not layer.document_ids:
        return None
    ids = torch.arange(layer.seq_len, dtype=torch.int32, device=layer.device) * 4 // layer.seq_len
    return ids.expand(layer.batch_size, -1).contiguous()


def forward(layer: Layer, backend: str) -> Callable[..., Tensor]:
    """The layer as a function of query, key and value."""
    ids = document_ids(layer)
    slopes = torch.full((layer.n_head,), 0.1, device=layer.device) if layer.alibi else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options: dict[str, Any] = {"window_size": layer.window_size, "softcap": layer.softcap, "alibi_slopes": slopes}
        return attention(q, k, v, is_causal=True, document_ids=ids, backend=backend, **options)

    return run


def measure_on_gpu(layer: Layer, backend: str) -> tuple[int, float]:
    """Peak bytes above the inputs, and the median seconds of a forward and backward pass."""
    inputs, run = layer.inputs(), forward(layer, backend)
    grad = torch.randn_like(inputs[0])

    def step() -> None:
        torch.autograd.grad(run(*inputs), inputs, grad)

    step()  # compiles and tunes
    torch.cuda.synchronize(layer.device)
    torch.cuda.reset_peak_memory_stats(layer.device)
    before = torch.cuda.memory_allocated(layer.device)
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return torch.cuda.max_memory_allocated(layer.device) - before, median(times)


def measure_on_cpu(layer: Layer, backend: str) -> tuple[int, float | None]:
    """Bytes that autograd keeps above the inputs, the output among them, and the median seconds of a forward and backward pass.

    No time for a Triton backend: on a CPU it runs in an interpreter.
    """
    inputs, run = layer.inputs(), forward(layer, backend)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run(*inputs)
    keep(output)
    n_bytes = sum(kept.values()) - sum(kept.get(x.untyped_storage().data_ptr(), 0) for x in inputs)
    if is_kernel(backend):
        return n_bytes, None

    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        torch.autograd.grad(run(*inputs), inputs, torch.ones_like(output))
        times.append(time.perf_counter() - start)
    return n_bytes, median(times)
