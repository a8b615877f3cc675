"""FlashAttention-3 for Hopper, in Gluon: TMA, asynchronous wgmma and warps with different work.

Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision" (2024). The mathematics is that of
flash_v2; what changes is who does what when, which `forward.py` and `backward.py` say for each kernel. The backward is five matrix
products in one kernel (flash_v2: seven in two), because all blocks of keys that see a query add to its dQ in memory, in float32.
The order of these additions changes from run to run, and with it the last bits of dq, unless deterministic gradients are asked
for; dk, dv and the forward are always the same.

This file is the host's side: which inputs these kernels take, how TMA is told where the tensors lie, and how many warps do what.
"""

import math
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..asked import Asked, Numbers, for_backward, numbers_for_kernels
from ..documents import tensors_for_kernels
from ..generations import capability, dtype_name
from ..launch import on
from ..layout import heads_last
from . import protocol
from .backward import backward_kernel
from .forward import forward_kernel
from .pre_post import postprocess_kernel, preprocess_kernel
from .state import BackwardConstants, ForwardConstants, Sizes

DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
L2 = 16 * 2**20  # bytes that the heads at work at a time may read again and again
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
QUERIES = protocol.QUERIES.value  # of a warpgroup's tile


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, features: frozenset[str]) -> str | None:
    """Why this rung cannot run, or None."""
    if device.type == "cpu":
        return "flash_v3 is written in Gluon, which has no interpreter: it needs a Hopper GPU"
    found = capability(device)
    if found != (9, 0):
        there = f"{found[0]}.{found[1]}" if found else device.type
        return f"flash_v3 needs a Hopper GPU (compute capability 9.0), not {there}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash_v3 takes float16 and bfloat16, not {dtype_name(dtype)}"
    if not 16 <= head_dim <= 256 or head_dim % 8:  # TMA reads rows of a multiple of 16 bytes
        return f"flash_v3 takes head_dim 16 to 256 in steps of 8, not {head_dim}"
    return None


# ---- how the kernels are set up ----


class Inputs(NamedTuple):
    """What a launch is made of: the tensors' device, dtype and sizes, and what is asked of attention."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, int, int, int]  # the query's
    n_kv_head: int
    seq_k: int
    numbers: Numbers
    documents: bool
    slopes: bool

    def kind(self) -> tuple[Any, ...]:
        """What a compilation depends on, beside its constants."""
        return self.device, self.dtype, *[x is None for x in self.numbers], self.documents, self.slopes

    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.shape[1] // self.n_kv_head

    def block_d(self) -> int:
        """head_dim, rounded up to what the kernels have."""
        return 64 if self.shape[3] <= 64 else 128 if self.shape[3] <= 128 else 256

    def cut_from(self) -> bool:
        """Whether some queries come before the first that sees a key."""
        return self.numbers.ahead is not None or self.documents

    def cut_to(self) -> bool:
        """Whether some queries come after the last that sees a key."""
        return self.numbers.behind is not None or self.documents

    def window(self) -> int | None:
        """Keys that a query sees at most, where a window says it."""
        behind, ahead = self.numbers.behind, self.numbers.ahead
        return None if behind is None or ahead is None else behind + ahead + 1


class Forward(NamedTuple):
    """A setting of the forward: 64 queries a warpgroup; how many blocks of keys and values TMA may bring ahead, and their size."""

    warpgroups: int
    buffers: int
    q_in_registers: bool
    block_k: int = 128

    def registers(self) -> tuple[int, int, int]:
        """Registers of a consumer's thread, of a producer's, and of the average thread, which the launch asks for."""
        return (240, 24, 168) if self.warpgroups == 2 else (160, 32, 128)

    def halves(self) -> bool:
        """Whether causality lets the first warpgroup see the first half of a tile's last block, and the second all of it."""
        return self.warpgroups == 2 and self.block_k == 2 * QUERIES


def forward_setting(inputs: Inputs) -> Forward:
    """The fastest of those timed on an H200 (docs/log.md)."""
    block_d, causal, window = inputs.block_d(), inputs.numbers.ahead == 0, inputs.window()
    if block_d == 256:
        return Forward(warpgroups=2, buffers=2, q_in_registers=False, block_k=64)
    if block_d == 128:
        narrow = window is not None and window < 1024  # few blocks of keys: their corners weigh more than their number
        return Forward(warpgroups=2, buffers=4 if narrow else 2, q_in_registers=False, block_k=64 if narrow else 128)
    if inputs.numbers.cap is not None or (causal and inputs.shape[2] < 2048):
        return Forward(warpgroups=2, buffers=3, q_in_registers=True)
    if inputs.cut_to() or inputs.slopes:
        return Forward(warpgroups=3, buffers=3, q_in_registers=False, block_k=64)
    return Forward(warpgroups=3, buffers=2, q_in_registers=False)


def backward_buffers(inputs: Inputs) -> int:
    """Blocks of keys and values that the backward has room for: with two the next comes while one is at work.

    Only at head_dim 64 is there room. Where blocks are long, and under a softcap, two are slower (docs/log.md).
    """
    often = inputs.cut_from() or inputs.shape[2] < 2048
    return 2 if inputs.block_d() == 64 and inputs.numbers.cap is None and often else 1


def ds_swizzle(block_d: int, deterministic: bool) -> int:
    """Over how many bytes the backward swizzles dS in shared memory.

    A thread's four stores take one address over 32 bytes, two over 64, four over 128, and the consumers have no registers to spare.
    Of the widths with which a Triton spills nothing at head_dim 64 and 128 the fastest (docs/log.md); where it spills with each, as
    3.8 does at 128, the fastest of all (tests/kernels/test_compile.py says how much).
    """
    since = (3, 7) if deterministic and block_d == 128 else (3, 9)
    if since <= TRITON and (block_d == 128 or deterministic):
        return 64
    return 128 if block_d == 128 and not deterministic else 32


# ---- what TMA is told ----


@cache
def _layout(shape: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(shape), DTYPES[dtype])


FLAT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def _descriptor(x: Tensor, *block: int, layout: gl.NVMMASharedLayout | None = None) -> TensorDescriptor:
    """Where x lies, for TMA to move blocks of it.

    Built without TensorDescriptor's own checks: a backward has eight, at 2 µs each, and `reachable` has seen to what they look at.
    """
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.strides = x, list(x.shape), list(x.stride())
    descriptor.block_shape, descriptor.layout = list(block), layout or _layout(block, x.dtype)
    return descriptor


def reachable(x: Tensor) -> Tensor:
    """x [B, H, S, D], or a copy where TMA cannot reach it: it wants multiples of 16 bytes everywhere, and no memory seen twice."""
    b, h, n, d = x.stride()
    if d == 1 and min(b, h, n) > 0 and (b | h | n) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return heads_last(x).copy_(x)


# ---- launching ----


class Ready:
    """A kernel on inputs of one kind. What Triton compiled is kept and launched directly, as in `kernels.launch`.

    The kernels take integers unspecialised and ask for no alignment that TMA does not, so one compilation serves all lengths.
    """

    def __init__(self, kernel: Any, options: dict[str, int]) -> None:
        self.kernel, self.options, self.compiled = kernel, options, None

    def __call__(self, programs: int, *arguments: Any) -> None:
        if self.compiled is None:
            self.compiled = self.kernel[(programs,)](*arguments, **self.options)
        else:
            self.compiled[(programs, 1, 1)](*arguments)


OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
BACKWARD_REGISTERS = 128  # of its main kernel's average thread


@cache
def ready(kernel: Any, registers: int | None, *kind: Any) -> Ready:
    """The launch for all inputs of one kind, remembered; `kind` is whatever a compilation depends on.

    `registers`: how many the launch asks for, of the average thread, where warpgroups divide them among themselves.
    """
    return Ready(kernel, OPTIONS if registers is None else OPTIONS | {"maxnreg": registers})


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has: a persistent launch has as many blocks."""
    return torch.cuda.get_device_properties(device).multi_processor_count


class Plan(NamedTuple):
    """All of a kernel's launch but the tensors, for inputs of one shape."""

    run: Ready
    programs: int
    block_d: int
    block_k: int
    numbers: tuple[Any, ...]  # the arguments after the tensors: what is asked, Sizes, constants


def forward_constants(inputs: Inputs, chosen: Forward) -> ForwardConstants:
    """What the forward's kernel has compiled in."""
    is_causal, shift = inputs.numbers.ahead == 0, inputs.seq_k - inputs.shape[2]
    # Beside the last block a tile sees, others may be cut at their end: by a window or documents, or a diagonal that misses the
    # blocks' corners. Under causality the diagonal alone cuts ends.
    between = shift % QUERIES != 0 if is_causal else inputs.cut_to()
    half = is_causal and chosen.halves() and shift % chosen.block_k == 0
    consumer, producer, _ = chosen.registers()
    return ForwardConstants(
        GROUP=inputs.group(), WARPGROUPS=chosen.warpgroups, BLOCK_K=chosen.block_k, HEAD_DIM=inputs.block_d(),
        BUFFERS=chosen.buffers, Q_IN_REGISTERS=chosen.q_in_registers, BETWEEN=between, HALF=half,
        CONSUMER_REGISTERS=consumer, PRODUCER_REGISTERS=producer,
    )  # fmt: skip


def backward_constants(inputs: Inputs, deterministic: bool) -> BackwardConstants:
    """What the backward's main kernel has compiled in."""
    block_d = inputs.block_d()
    return BackwardConstants(
        GROUP=inputs.group(), HEAD_DIM=block_d, BUFFERS=backward_buffers(inputs), SWIZZLE=ds_swizzle(block_d, deterministic),
        FROM=inputs.cut_from(), TO=inputs.cut_to(), DETERMINISTIC=deterministic,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def forward_plan(inputs: Inputs, output_dtype: torch.dtype, use: Forward | None) -> Plan:
    """The forward's launch."""
    (batch, n_head, seq_q, _), block_d = inputs.shape, inputs.block_d()
    chosen = use or forward_setting(inputs)
    n_tile = -(-seq_q // (QUERIES * chosen.warpgroups))
    n_tiles = n_tile * batch * n_head
    at_once = min(batch * n_head, max(1, L2 // (inputs.seq_k * block_d * 4)) * inputs.group())
    constants = forward_constants(inputs, chosen)
    sizes = Sizes(
        heads=n_head, seq_q=seq_q, seq_k=inputs.seq_k,
        n_tile=n_tile, n_tiles=n_tiles, heads_at_once=at_once, batch_heads=batch * n_head,
    )  # fmt: skip
    _, _, average = chosen.registers()
    run = ready(forward_kernel, average, *inputs.kind(), output_dtype, constants)
    return Plan(run, min(multiprocessors(inputs.device), n_tiles), block_d, chosen.block_k, (*inputs.numbers, *sizes, *constants))


def output_width(block_d: int, output_dtype: torch.dtype) -> int:
    """Columns of the output that the forward stores at once: at head_dim 256 they must fit in Q's place."""
    return 128 if block_d == 256 and output_dtype == torch.float32 else block_d


@lru_cache(maxsize=4096)
def backward_plan(inputs: Inputs, deterministic: bool) -> Plan:
    """The launch of the backward's main kernel."""
    (batch, _, seq_q, _), block_d = inputs.shape, inputs.block_d()
    batch_heads = batch * inputs.n_kv_head
    block_k = protocol.keys_of(block_d)
    n_tile = -(-inputs.seq_k // block_k)
    n_tiles = n_tile * batch_heads
    at_once = min(batch_heads, max(1, L2 // (seq_q * block_d * 8 * inputs.group())))
    constants = backward_constants(inputs, deterministic)
    sizes = Sizes(
        heads=inputs.n_kv_head, seq_q=seq_q, seq_k=inputs.seq_k,
        n_tile=n_tile, n_tiles=n_tiles, heads_at_once=at_once, batch_heads=batch_heads,
    )  # fmt: skip
    run = ready(backward_kernel, BACKWARD_REGISTERS, *inputs.kind(), constants)
    return Plan(run, min(multiprocessors(inputs.device), n_tiles), block_d, block_k, (*inputs.numbers, *sizes, *constants))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    asked: Asked,
    *,
    output_dtype: torch.dtype | None = None,
    use: Forward | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Sq, D] (in memory [B, Sq, Hq, D]; in `output_dtype`, by default the inputs') and lse [B, Hq, Sq] float32.

    `attention` has checked what is asked; its scale is positive. `use` replaces the setting.
    """
    output = heads_last(query, output_dtype)
    lse = torch.empty(query.shape[:3], device=query.device, dtype=torch.float32)
    if output.numel() == 0 or key.shape[2] == 0:
        return output.zero_(), lse.fill_(-math.inf)
    inputs = _inputs(query, key, asked)
    plan = forward_plan(inputs, output.dtype, use)
    d, keys = plan.block_d, plan.block_k
    with on(query.device):
        query, key, value = reachable(query), reachable(key), reachable(value)
        counter = torch.zeros(1, device=query.device, dtype=torch.int32)
        plan.run(
            plan.programs,
            _descriptor(query, 1, 1, QUERIES, d), _descriptor(key, 1, 1, keys, d), _descriptor(value, 1, 1, keys, d),
            _descriptor(output, 1, 1, QUERIES, output_width(d, output.dtype)), lse,
            *tensors_for_kernels(asked, query.device), counter, *plan.numbers,
        )  # fmt: skip
    return output, lse


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    asked: Asked,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in their dtypes, in memory [B, S, H, D].

    `output` and `lse` may come from several forwards merged (ring attention): only delta and the probabilities are made of them.
    """
    batch, n_head, seq_q, head_dim = query.shape
    dq, dk, dv = heads_last(query), heads_last(key), heads_last(value)
    if query.numel() == 0 or key.shape[2] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    plan = backward_plan(_inputs(query, key, asked), asked.deterministic)
    d, box = plan.block_d, (1, 1, 64, protocol.width_of(plan.block_d))  # what TMA moves at a time, of queries and of keys
    with on(query.device):
        grad_output, grad_lse, query, key, value, output, lse = for_backward(
            grad_output.to(query.dtype), grad_lse, query, key, value, output, lse, asked
        )
        query, key, value, output, grad_output = map(reachable, (query, key, value, output, grad_output))
        tiles = batch * n_head * -(-seq_q // QUERIES)
        stats = torch.empty((tiles, 2 * QUERIES), device=query.device, dtype=torch.float32)
        dq_sum = torch.empty((tiles * 2 * d, 32), device=query.device, dtype=torch.float32)
        counter = torch.empty(1 + tiles, device=query.device, dtype=torch.int32)
        constants = (head_dim, d, QUERIES)
        kind = (query.device, query.dtype, constants)
        ready(preprocess_kernel, None, *kind, output.dtype, lse.dtype, None if grad_lse is None else grad_lse.dtype)(
            tiles, output, grad_output, lse, grad_lse, stats, dq_sum, counter,
            *output.stride()[:3], *grad_output.stride()[:3], n_head, seq_q, *constants,
        )  # fmt: skip
        plan.run(
            plan.programs,
            _descriptor(query, *box), _descriptor(grad_output, *box), _descriptor(key, *box), _descriptor(value, *box),
            _descriptor(stats, 1, 2 * QUERIES, layout=FLAT), _descriptor(dq_sum, 2 * QUERIES, 32),
            _descriptor(dk, *box), _descriptor(dv, *box),
            *tensors_for_kernels(asked, query.device), counter, *plan.numbers,
        )  # fmt: skip
        ready(postprocess_kernel, None, *kind)(tiles, dq_sum, dq, *dq.stride()[:3], n_head, seq_q, asked.scale, *constants)
    return dq, dk, dv


def _inputs(query: Tensor, key: Tensor, asked: Asked) -> Inputs:
    (batch, n_head, seq_q, head_dim), (_, n_kv_head, seq_k, _) = query.shape, key.shape
    documents, slopes = asked.document_ids is not None, asked.alibi_slopes is not None
    shape, numbers = (batch, n_head, seq_q, head_dim), numbers_for_kernels(asked, seq_q, seq_k)
    return Inputs(query.device, query.dtype, shape, n_kv_head, seq_k, numbers, documents, slopes)
