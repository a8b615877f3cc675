"""Words that Gluon lacks and flash_v3's kernels need: instructions, a layout, and turns between blocks.

TMA's names changed from Triton 3.6 to 3.9 and are brought to one here.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

from .barriers import PUBLISHED, WARPGROUP, barrier_text

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
if hasattr(tma, "async_atomic_add"):
    tma_add = tma.async_atomic_add
else:  # Triton 3.6 and 3.7 have the instruction and no word for it
    from triton._C.libtriton import ir

    @builtin
    def tma_add(descriptor, coordinates, source, _semantic=None):
        """Adds shared memory to a block of the tensor."""
        coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, source.handle)


@builtin
def reinterpreted(memory, dtype, shape, layout, _semantic=None):
    """The same shared memory with another dtype, shape and layout. (Gluon's own word for it changed with Triton 3.9.)"""
    dtype, layout = _unwrap_if_constexpr(dtype), _unwrap_if_constexpr(layout)
    return _semantic.memdesc_reinterpret(memory, dtype, [_unwrap_if_constexpr(n) for n in shape], layout)


@gluon.constexpr_function
def wgmma_layout(columns: int) -> gl.NVMMADistributedLayout:
    """How the threads of a warpgroup hold a product of 64 rows and, instruction by instruction, this many columns."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


# ---- blocks that take turns ----


@gluon.jit
def await_at_least(pointer, number):
    """Waits until another block has published `number` or more. What TMA adds from here on comes after that block's additions."""
    found = _acquire(pointer)
    while found < number:
        found = _acquire(pointer)
    thread = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise("fence.proxy.async; mov.b32 $0, $1;", "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _acquire(pointer):
    """The number that another block has published; every lane has lane 0's copy."""
    TEXT: gl.constexpr = "{ .reg .b32 t; ld.acquire.gpu.global.b32 t, [$1]; shfl.sync.idx.b32 $0, t, 0, 31, -1; }"
    where = gl.full([1], pointer.to(gl.int64), gl.int64, gl.BlockedLayout([1], [32], [4], [0]))
    return gl.max(gl.inline_asm_elementwise(TEXT, "=r,l", [where], dtype=gl.int32, is_pure=False, pack=1), 0)


@gluon.constexpr_function
def _added_up_text(pending: int) -> str:
    return f"cp.async.bulk.wait_group {pending}; fence.proxy.async; {barrier_text('sync', PUBLISHED, WARPGROUP)}"


@gluon.jit
def publish(pointer, number, PENDING: gl.constexpr):
    """Raises the number that others await to this one, once TMA's additions are in memory.

    That is all that this warpgroup has asked TMA to add, but for the last PENDING times. (tma.store_wait is not enough: it waits
    until what is to be added has been read.)
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    thread = gl.arange(0, 128, layout=layout)
    WAIT: gl.constexpr = _added_up_text(PENDING)
    gl.inline_asm_elementwise(WAIT, "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)
    RAISE: gl.constexpr = (
        "{ .reg .pred first; setp.eq.u32 first, $1, 0; @first red.release.gpu.global.max.s32 [$2], $3; mov.b32 $0, $1; }"
    )
    where = gl.full([128], pointer.to(gl.int64), gl.int64, layout)
    numbers = gl.full([128], number, gl.int32, layout)
    gl.inline_asm_elementwise(RAISE, "=r,r,l,r", [thread, where, numbers], dtype=gl.int32, is_pure=False, pack=1)
