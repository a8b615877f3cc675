"""Shared memory that compares every access with those before, the tiles that TMA reaches, and pointers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from tests.hopper.machine import Clock, MBarrier, Thread
from tests.hopper.values import DTYPES, NAMES, HardwareFault, Value, tensor


class Slot:
    """One element of a buffer's first axis. The kernels wait for it as a whole, so accesses are compared per slot."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.written: tuple[Any, int] | None = None  # the actor of the last write, and its time
        self.read: dict[Any, int] = {}  # the actors that have read since that write, and their times
        self.stored: tuple[Thread, int | None] | None = None  # the thread that stored last, and its time at the fence after that
        self.barrier: MBarrier | None = None

    def shown(self, known: Clock, whom: str) -> None:
        """Checks that the asynchronous proxy sees the last store: the actor must know of a fence after it."""
        if self.stored is not None:
            thread, fenced = self.stored
            if fenced is None or known.get(thread, 0) < fenced:
                raise HardwareFault(f"{self.name} was stored by {thread.name} without fence_async_shared: {whom} may not see it")

    def access(self, actor: Any, time: int, known: Clock, *, writes: bool, by_hardware: bool) -> None:
        """`known`: what the actor knows to be over. `by_hardware`: by the tensor cores or TMA, in the asynchronous proxy."""
        if self.written is None and not writes:
            raise HardwareFault(f"{self.name} is read and has never been written")
        before = dict(self.read) if writes else {}
        if self.written is not None:
            before[self.written[0]] = max(self.written[1], before.get(self.written[0], 0))
        for other, when in before.items():
            if known.get(other, 0) < when:
                does = "writes" if writes else "reads"
                raise HardwareFault(f"a race for {self.name}: {_named(actor)} {does}, {_named(other)} may not be done")
        if by_hardware:
            self.shown(known, _named(actor))
        if writes:
            self.written, self.read = (actor, time), {}
        else:
            self.read[actor] = time


def _named(actor: Any) -> str:
    if isinstance(actor, Thread):
        return actor.name
    owner, what = actor
    return f"{what} for {owner.name}"


class Shared:
    """A view of shared memory. `slots` are the buffer's slots; `slot` is the one that the view lies in, if there is one."""

    def __init__(self, data: Tensor, slots: list[Slot], slot: Slot | None, me: Any) -> None:
        self.data, self.slots, self.slot, self._me = data, slots, slot, me

    shape = property(lambda self: list(self.data.shape))
    dtype = property(lambda self: NAMES[self.data.dtype])

    def _seen(self, data: Tensor) -> Shared:
        return Shared(data, self.slots, self.slot, self._me)

    def index(self, i: Value | int) -> Shared:
        i = int(tensor(i))
        if not 0 <= i < len(self.slots):
            raise HardwareFault(f"{self.slots[0].name} has no place {i}")
        return Shared(self.data[i], self.slots, self.slots[i], self._me)

    def reshape(self, shape: list[int]) -> Shared:
        return self._seen(self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return self._seen(self.data.permute(order))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return self._seen(self.data.narrow(dim, start, length))

    def load(self, layout: Any) -> Value:
        me = self._me()
        self.slot.access(me, me.clock[me], me.clock, writes=False, by_hardware=False)
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        me = self._me()
        self.slot.access(me, me.clock[me], me.clock, writes=True, by_hardware=False)
        self.slot.stored = me, None
        me.unfenced.add(self.slot)
        assert self.data.dtype == value.data.dtype and self.data.shape == value.data.shape
        self.data.copy_(value.data)


def allocate(dtype: gl.dtype, shape: list[int], me: Any) -> Shared:
    """Shared memory that nothing has written: NaN."""
    n_bytes = DTYPES[dtype].itemsize * torch.Size(shape).numel()
    data = torch.full((n_bytes,), 255, dtype=torch.uint8).view(DTYPES[dtype]).view(shape)
    return Shared(data, [Slot(f"{dtype} {shape}[{i}]") for i in range(shape[0])], None, me)


def reinterpreted(memory: Shared, dtype: gl.dtype, shape: list[int], layout: Any) -> Shared:
    """The same memory and slots, with another dtype and shape."""
    flat = memory.data.reshape(-1).view(torch.uint8)
    n_bytes = DTYPES[dtype].itemsize * torch.Size(shape).numel()
    assert shape[0] == len(memory.slots) and n_bytes == flat.numel(), "a slot of one must be a slot of the other"
    return Shared(flat.view(DTYPES[dtype]).view(shape), memory.slots, None, memory._me)


class Tiles:
    """A descriptor for TMA: blocks of a tensor, outside of which TMA reads zeros and writes nothing."""

    def __init__(self, base: Tensor, block: list[int]) -> None:
        self.base = base.detach()
        self.block_type = SimpleNamespace(shape=block, nbytes=base.element_size() * torch.Size(block).numel())
        self.dtype, self.layout = NAMES[base.dtype], "layout"

    def _inside(self, at: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of the block at these coordinates that lies in the tensor: as slices of the tensor, and of the block."""
        ends = [max(0, min(n, i + size)) for n, i, size in zip(self.base.shape, at, self.block_type.shape, strict=True)]
        there = tuple(slice(max(i, 0), end) for i, end in zip(at, ends, strict=True))
        return there, tuple(slice(s.start - i, max(s.stop, s.start) - i) for s, i in zip(there, at, strict=True))

    def read(self, at: list[int], to: Tensor) -> None:
        assert to.dtype == self.base.dtype
        there, here = self._inside(at)
        block = torch.zeros(self.block_type.shape, dtype=self.base.dtype)
        block[here] = self.base[there]
        to.copy_(block.view(to.shape))

    def write(self, at: list[int], block: Tensor, *, add: bool) -> None:
        there, here = self._inside(at)
        block = block.view(self.block_type.shape)[here]
        self.base[there] = self.base[there] + block if add else block


class Pointer:
    """A tensor in global memory and one offset or many."""

    def __init__(self, base: Tensor, offset: Value | int = 0) -> None:
        self.base, self.offset = base.detach().view(-1), offset

    def __add__(self, more: Value | int) -> Pointer:
        return Pointer(self.base, more + self.offset)

    def __sub__(self, less: int) -> Pointer:
        return self + -less

    def to(self, dtype: gl.dtype) -> Value:
        """The address of the element."""
        return Value(torch.tensor(self.base.data_ptr() + self.base.element_size() * int(tensor(self.offset))))

    def where(self, mask: Value | None) -> tuple[Tensor, Tensor]:
        """The indices (0 where the mask is off), checked to lie in the tensor, and the mask."""
        index = tensor(self.offset).long()
        on = torch.ones_like(index, dtype=torch.bool) if mask is None else mask.data.expand_as(index)
        if (on & ((index < 0) | (index >= len(self.base)))).any():
            raise HardwareFault(f"an access outside a tensor of {len(self.base)} elements")
        return torch.where(on, index, 0), on
