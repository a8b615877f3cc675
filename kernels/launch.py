"""What the launches of the Triton rungs share: where they can run, and launching fast."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from .asked import Numbers
from .generations import capability, dtype_name
from .jit import INTERPRET, interpreter_trouble
from .tiles import Tile
from .turing import tensor_cores

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refusal(rung: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a Triton rung cannot run, or None."""
    if dtype not in DTYPES:
        return f"{rung} takes float16, bfloat16 and float32, not {dtype_name(dtype)}"
    if not 16 <= head_dim <= 256:
        return f"{rung} takes head_dim 16 to 256, not {head_dim}"
    if device.type == "cpu":
        return interpreter_trouble()
    found = capability(device)
    if found is None:
        return f"{rung} needs an NVIDIA GPU, not {device.type}"
    if found < (7, 5):
        return f"{rung} needs Turing (compute capability 7.5) or newer, not {found[0]}.{found[1]}"
    if found == (7, 5) and dtype != torch.float16:
        return f"{rung} takes float16 on Turing, whose tensor cores have no {dtype_name(dtype)}"
    return None


@cache
def warn_once(rung: str) -> None:
    """Says, the first time, that the interpreter is at work."""
    warnings.warn(f"{rung} runs in Triton's interpreter on the CPU: for checking, far too slow to train with", stacklevel=3)


AXIS = 65_535  # as many programs as CUDA takes along the second and third axis of a grid


def grid(n_tile: int, n_head: int, batch: int) -> tuple[tuple[int, int, int], bool]:
    """A program for each tile of each head, an axis for each; all on the first one where the others are too short (True).

    With an axis for each a program knows its place without two divisions before its first load: 1 to 2 % on the whole
    (docs/log.md).
    """
    if max(n_head, batch) > AXIS:
        return (n_tile * n_head * batch, 1, 1), True
    return (n_tile, n_head, batch), False


def launch(
    kernel: Any,
    tile: Tile,
    programs: tuple[int, int, int],
    tensors: tuple[Tensor | None, ...],
    strided: tuple[Tensor, ...],
    sizes: tuple[int, int, int],
    numbers: Numbers,
    group: int,
    **constants: bool,
) -> None:
    """Runs a kernel.

    Args:
        kernel: its arguments are `tensors`, strides, `sizes`, those of `numbers`, and those that `Launch` compiles in.
        tile: its block sizes, warps and stages.
        programs: how many of them run, along each axis.
        tensors: None where one is not needed.
        strided: the query and the other tensors [B, H, S, D] whose batch, head and position strides the kernel takes.
        sizes: heads, seq_q, seq_k.
        group: query heads that share a key/value head.
        constants: compile-time arguments of this kernel alone.
    """
    query = strided[0]
    strides = tuple([stride for x in strided for stride in x.stride()[:3]])
    dtypes = tuple([None if x is None else x.dtype for x in tensors])
    products = precision(query.dtype, query.shape[-1])
    ready = prepare(
        kernel, tile, programs, query.device, dtypes, strides, sizes, numbers, group, query.shape[-1], products, **constants
    )
    with on(query.device):
        ready(*tensors)


def on(device: torch.device) -> AbstractContextManager:
    """A context in which kernels are launched on `device`: Triton takes the current GPU."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


class Launch:
    """One kernel on inputs of one kind, ready to go.

    At every launch Triton finds out afresh which of its compilations the arguments want: 26 µs on a GPU server's CPU for the 35
    arguments of these kernels. All that it looks at is settled here, but for whether each pointer is a multiple of 16 bytes; so
    what it compiled is kept for each pattern of those, and launched directly.
    """

    def __init__(self, kernel: Any, programs: tuple[int, int, int], device: torch.device, values: tuple, options: dict) -> None:
        self.kernel, self.grid, self.values, self.options = kernel, programs, values, options
        self.capability = capability(device)
        self.compiled: dict[tuple[bool, ...], Any] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        aligned = tuple([x is None or x.data_ptr() % 16 == 0 for x in tensors])
        compiled = self.compiled.get(aligned)
        if compiled is not None:
            compiled[self.grid](*tensors, *self.values)
            return
        with tensor_cores(self.capability) as turing:
            compiled = self.kernel[self.grid](*tensors, *self.values, **self.options, **turing)
        if not INTERPRET:
            self.compiled[aligned] = compiled


@lru_cache(maxsize=4096)
def prepare(
    kernel: Any,
    tile: Tile,
    programs: tuple[int, int, int],
    device: torch.device,
    dtypes: tuple[torch.dtype | None, ...],
    strides: tuple[int, ...],
    sizes: tuple[int, int, int],
    numbers: Numbers,
    group: int,
    head_dim: int,
    products: str,
    **constants: bool,
) -> Launch:
    """The launch for all inputs that agree in these, remembered. Compilations depend on `dtypes` and `device`, so they are here."""
    fixed = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "PRECISION": products,
        "WIDE": any(max(tile.block_q, tile.block_k) * stride >= 2**31 for stride in strides[2::3]),  # offsets inside a tile
    } | constants
    options = tile.options()
    return Launch(kernel, programs, device, (*strides, *sizes, *numbers, *fixed.values()), options)


def precision(dtype: torch.dtype, head_dim: int) -> str:
    """How tl.dot multiplies float32: as float32 unless PyTorch has been told that TensorFloat-32 will do.

    Up to head_dim 128 three TensorFloat-32 products stand for one of float32, with the same error; beyond, they lose 2.4 times as
    much as eager attention does, and plain multiply-adds it is.
    """
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if head_dim <= 128 else "ieee"
