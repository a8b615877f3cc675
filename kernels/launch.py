"""What the launches of the Triton rungs share: where a rung can run, and a fast launch."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .asked import Numbers
from .generations import capability, dtype_name
from .interpreter import launching
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
    """Warns once per rung that Triton's interpreter runs it."""
    warnings.warn(f"{rung} runs in Triton's interpreter on the CPU: for checking, far too slow to train with", stacklevel=3)


AXIS = 65_535  # CUDA's limit on programs along the second and third axis of a grid


def grid(n_tile: int, n_head: int, batch: int) -> tuple[tuple[int, int, int], bool]:
    """The grid with one program for each tile of each head, and whether it is flat.

    Tiles, heads and batch have an axis each, which spares a program two divisions before its first load: 1 to 2 % on the whole
    (docs/log.md). Where heads or batch exceed AXIS, the first axis holds all programs (True).
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
        kernel: takes `tensors`, their strides, `sizes`, the fields of `numbers`, and the constants that `prepare` adds.
        tile: its block sizes, warps and stages.
        programs: how many run along each axis of the grid.
        tensors: None for one that the call does not need.
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
    """A context that makes `device` the current GPU, on which Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@contextmanager
def readable_cache_errors() -> Iterator[None]:
    """Names the folder where Triton keeps what it compiles, and the way to another one, when that cannot be written."""
    try:
        yield
    except OSError as error:
        folder = Path(triton.knobs.cache.dir)
        if error.filename is None or folder not in (path := Path(error.filename), *path.parents):
            raise
        advice = f"Triton cannot keep what it compiles in {folder} ({error.strerror}); TRITON_CACHE_DIR=PATH names another folder"
        raise OSError(error.errno, advice) from error


class Launch:
    """One kernel, ready to launch on inputs of one kind.

    At every launch Triton looks up which of its compilations fits the arguments: 26 µs on a GPU server's CPU for the 35 arguments
    of these kernels. Here all that this depends on is fixed, except whether each pointer is a multiple of 16 bytes. So this class
    keeps one compilation for each pattern of alignment, and launches it directly.
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
        if INTERPRET:
            with launching():
                self.kernel[self.grid](*tensors, *self.values, **self.options)
            return
        with tensor_cores(self.capability) as turing, readable_cache_errors():
            self.compiled[aligned] = self.kernel[self.grid](*tensors, *self.values, **self.options, **turing)


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
    """The cached launch for all inputs that agree in these arguments. Compilations depend on `dtypes` and `device` too."""
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
    """How tl.dot multiplies float32: as float32, unless PyTorch's setting allows TensorFloat-32.

    Up to head_dim 128, three TensorFloat-32 products replace one of float32, with the same error. Beyond 128 their error is 2.4
    times that of eager attention, so tl.dot uses plain multiply-adds.
    """
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if head_dim <= 128 else "ieee"
