"""Gluon's words, as far as flash_v3 uses them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from tests.helpers import ptx
from tests.hopper.machine import ADDED, BULK, LOAD, MMA, Clock, Event, Machine, MBarrier, Thread, come
from tests.hopper.memory import Pointer, Shared, Tiles, allocate, reinterpreted
from tests.hopper.values import DTYPES, HardwareFault, Number, Value, divided, of_both, tensor, together


class Product(Value):
    """A product in flight, which is computed when it is awaited. The value is in what the wait returns, not in this object."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make, self.made = make, None

    @property
    def data(self) -> Tensor:
        raise HardwareFault("a product is used and has not been awaited")


class Words:
    """The meaning of the kernels' names on a machine. `names` replaces the kernels' globals."""

    def __init__(self, machine: Machine, programs: int, tensors: list[Tensor], sums_in_order: bool) -> None:
        self.machine, self.programs, self.tensors, self.sums_in_order = machine, programs, tensors, sums_in_order
        self.released: dict[int, Clock] = {}  # by the address of a number in global memory: what its releases tell
        self.sums: dict[tuple[int, ...], tuple[Thread, int]] = {}  # by address and place: last adder, its n_bulk then
        self.names = {
            "gl": self._gl(),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=_layout, init=self.init, wait=self.wait, arrive=self.arrive, expect=self.expect
            ),
            "tma": SimpleNamespace(store_wait=self.store_wait),
            "tma_load": self.load_tile,
            "tma_store": lambda tiles, at, source: self.store_tile(tiles, at, source, add=False),
            "tma_add": lambda tiles, at, source: self.store_tile(tiles, at, source, add=True),
            "fence_async_shared": self.fence,
            "warpgroup_mma": self.product,
            "warpgroup_mma_wait": self.await_products,
            "reinterpreted": reinterpreted,
        }

    def me(self) -> Thread:
        return self.machine.me

    def _gl(self) -> SimpleNamespace:
        types = {name: getattr(gl, name) for name in ("float16", "bfloat16", "float32", "int16", "int32", "int64")}
        layouts = ("BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "DotOperandLayout", "SwizzledSharedLayout")
        return SimpleNamespace(
            **types,
            **dict.fromkeys(layouts, _layout),
            NVMMASharedLayout=_layout,
            constexpr=lambda x: x,
            static_range=range,
            program_id=lambda axis: Value(torch.tensor(self.me().block.number, dtype=torch.int32)),
            num_programs=lambda axis: Value(torch.tensor(self.programs, dtype=torch.int32)),
            minimum=of_both(torch.minimum),
            maximum=of_both(torch.maximum),
            cdiv=of_both(lambda a, b: divided(a + b - 1, b)),
            where=lambda on, a, b: Value(torch.where(tensor(on), *together(a, b))),
            exp2=lambda x: Value(torch.exp2(x.data)),
            log2=lambda x: Value(torch.log2(x.data)),
            sum=lambda x, axis: Value(x.data.sum(axis)),
            max=lambda x, axis: Value(x.data.amax(axis)),
            split=lambda x: tuple(Value(half) for half in x.data.unbind(-1)),
            join=lambda a, b: Value(torch.stack((a.data, b.data), -1)),
            full=lambda shape, x, dtype, layout: Value(tensor(x).to(DTYPES[dtype]).expand(shape)),
            zeros=lambda shape, dtype, layout: Value(torch.zeros(shape, dtype=DTYPES[dtype])),
            arange=lambda start, end, layout: Value(torch.arange(start, end, dtype=torch.int32)),
            convert_layout=lambda x, layout, assert_trivial=False: x,
            load=lambda pointer: Value(pointer.base[pointer.where(None)[0]]),
            store=self.store,
            atomic_add=self.atomic_add,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.warp_specialize,
            inline_asm_elementwise=self.inline_asm,
        )

    # ---- memory ----

    def store(self, pointer: Pointer, value: Value, mask: Value) -> None:
        index, on = pointer.where(mask)
        pointer.base[index[on]] = value.data[on]

    def atomic_add(self, pointer: Pointer, n: Number) -> Value:
        self.machine.pause()
        index, _ = pointer.where(None)
        before = pointer.base[index].clone()
        pointer.base[index] += n
        return Value(before)

    def allocate(self, dtype: gl.dtype, shape: list[int], layout: Any) -> Shared:
        return allocate(dtype, shape, self.me)

    def fence(self) -> None:
        me = self.me()
        for slot in me.unfenced:
            if slot.stored == (me, None):
                slot.stored = me, me.clock[me]
        me.unfenced.clear()

    # ---- barriers in shared memory ----

    def init(self, memory: Shared, count: int) -> None:
        """TMA, which arrives at the barrier, sees it only after a fence."""
        memory.slot.barrier = MBarrier(memory.slot.name, count)
        memory.slot.stored = self.me(), None
        self.me().unfenced.add(memory.slot)

    def wait(self, memory: Shared, phase: Value | int) -> None:
        _barrier(memory).wait(self.machine, int(tensor(phase)))

    def arrive(self, memory: Shared, count: int) -> None:
        _barrier(memory).arrive(self.me(), count)
        self.machine.pause()

    def expect(self, memory: Shared, n_bytes: int) -> None:
        _barrier(memory).arrive(self.me(), 1, n_bytes)

    # ---- TMA ----

    def load_tile(self, tiles: Tiles, at: list[Value | int], full: Shared, to: Shared) -> None:
        """Starts a load. Until the tile has come, its place holds NaN."""
        me, barrier, at = self.me(), _barrier(full), [int(tensor(i)) for i in at]
        full.slot.shown(me.clock, "TMA")
        barrier.n_loads += 1
        actor, number = (barrier, LOAD), barrier.n_loads
        me.block.loads[actor] = number
        to.slot.access(actor, number, me.clock, writes=True, by_hardware=True)
        to.data.view(torch.uint8).fill_(255)

        def come_in() -> None:
            tiles.read(at, to.data)
            barrier.now[actor] = barrier.came[actor] = max(number, barrier.came.get(actor, 0))
            barrier.add_bytes(-tiles.block_type.nbytes)

        self.machine.events.append(Event(come_in))
        self.machine.pause()

    def store_tile(self, tiles: Tiles, at: list[Value | int], source: Shared, add: bool) -> None:
        me, at = self.me(), [int(tensor(i)) for i in at]
        if add and me.last_read:
            raise HardwareFault("what TMA adds may come before what was waited for: a fence is missing")
        me.n_bulk += 1
        if add and self.sums_in_order:
            place = (tiles.base.data_ptr(), *at)
            other, number = self.sums.get(place, (me, 0))
            if me.clock.get((other, ADDED), 0) < number:
                raise HardwareFault(f"{me.name} of block {me.block.number} adds where {other.name} of another may not be done")
            self.sums[place] = me, me.n_bulk
        source.slot.access((me, BULK), me.n_bulk, me.clock, writes=False, by_hardware=True)
        block = source.data.clone()
        self.machine.events.append(Event(lambda: tiles.write(at, block, add=add), me, me.n_bulk))
        self.machine.pause()

    def store_wait(self, pendings: int) -> None:
        """Waits until TMA has read all but the last `pendings` stores."""
        me = self.me()
        me.clock[me, BULK] = max(me.clock.get((me, BULK), 0), me.n_bulk - pendings)
        self.machine.pause()

    # ---- tensor cores ----

    def product(self, a: Value | Shared, b: Shared, acc: Value, use_acc: bool = True, is_async: bool = False) -> Product:
        me = self.me()
        assert is_async, "the kernels have no other"
        me.n_products += 1
        if isinstance(acc, Product) and acc.made is not None:
            raise HardwareFault("a product goes on from one that was awaited under another name")
        for operand in (a, b):
            if isinstance(operand, Shared):
                operand.slot.access((me, MMA), me.n_products, me.clock, writes=False, by_hardware=True)

        def make() -> Tensor:
            product = a.data.float() @ b.data.float()
            return product + (acc.made if isinstance(acc, Product) else acc.data) if use_acc else product

        me.products.append(Product(make))
        self.machine.pause()
        return me.products[-1]

    def await_products(self, in_flight: int, deps: tuple[Value, ...]) -> Value | tuple[Value, ...]:
        me = self.me()
        while len(me.products) > in_flight:
            product = me.products.pop(0)
            product.made = product.make()
        me.clock[me, MMA] = me.n_products - len(me.products)
        self.machine.pause()
        done = tuple(x if getattr(x, "made", None) is None else Value(x.made) for x in deps)
        return done if len(done) > 1 else done[0]

    # ---- warpgroups ----

    def warp_specialize(self, parts: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]) -> None:
        me, machine = self.me(), self.machine
        assert len(parts) == len(warps) + 1 == len(registers) + 1
        _name(sys._getframe(1).f_locals)
        me.name, others = f"{parts[0][0].__name__} 0", []
        for i, ((function, arguments), n) in enumerate(zip(parts[1:], warps, strict=True), 1):
            name = f"{function.__name__} {i}"
            others.append(machine.start(name, me.block, n, me, lambda f=function, x=arguments: f(*x)))
        function, arguments = parts[0]
        function(*arguments)
        machine.pause(lambda: not any(thread in machine.alive for thread in others), "the other warps to end")
        for other in others:
            me.clock.learn(other.clock)
        for number, barrier in me.block.barriers.items():
            if barrier.round:
                names = ", ".join(thread.name for thread in barrier.round.came)
                raise HardwareFault(f"barrier {number} is left with {names} at it, and nobody else comes")
        for actor, number in me.block.loads.items():
            if me.clock.get(actor, 0) < number:
                raise HardwareFault(f"the block ends, and what TMA loads for {actor[0].name} may still come")

    # ---- inline PTX ----

    def inline_asm(self, text: str, constraints: str, arguments: list[Value], dtype: Any, is_pure: bool, pack: int) -> Any:
        """Recognises barriers, fences and numbers between blocks by their text; runs anything else lane by lane."""
        me, machine, first = self.me(), self.machine, arguments[0]
        barrier = re.fullmatch(r"(bar|barrier)\.(sync|arrive) (\$1|\d+), (\d+); mov\.b32 \$0, \$1;", text)
        added = re.fullmatch(r"cp\.async\.bulk\.wait_group (\d+); fence\.proxy\.async; bar\.sync 5, 128; mov\.b32 \$0, \$1;", text)
        if barrier:
            form, operation, number, total = barrier.groups()
            if first.data.numel() != 32 * me.warps:
                raise HardwareFault(f"{me.name} has {me.warps} warps, and {first.data.numel()} threads are to come to a barrier")
            number = int(first.data.flatten()[0]) if number == "$1" else int(number)
            come(machine, number, int(total), waits=operation == "sync", aligned=form == "bar")
        elif text == "fence.proxy.async; mov.b32 $0, $1;":
            me.last_read = None
        elif added:
            last = me.n_bulk - int(added[1])
            machine.deliver(lambda event: event.owner is me and event.number <= last)
            for what in (BULK, ADDED):
                me.clock[me, what] = max(me.clock.get((me, what), 0), last)
            come(machine, 5, 128, waits=True, aligned=True)
        elif "ld.acquire.gpu.global.b32" in text:
            return self._acquire(int(first.data))
        elif "red.release.gpu.global.max.s32" in text:
            self._release(int(arguments[1].data[0]), int(arguments[2].data[0]))
        elif "bra DONE" in text:
            return _on_lanes(text, constraints, arguments, dtype, pack)
        elif text != "shfl.sync.idx.b32 $0, $1, 0, 31, -1;":
            raise HardwareFault(f"PTX that is not known here: {text}")
        return first

    def _number_at(self, address: int) -> Tensor:
        """The int32 at this address."""
        for x in self.tensors:
            i = (address - x.data_ptr()) // 4
            if x.dtype == torch.int32 and 0 <= i < x.numel():
                return x.view(-1)[i : i + 1]
        raise HardwareFault("an address outside all tensors")

    def _acquire(self, address: int) -> Value:
        """Reads a number. A thread that reads the same number again waits until it has changed."""
        me, number = self.me(), self._number_at(address)
        if me.last_read == (address, int(number)):
            before = int(number)
            self.machine.pause(lambda: int(number) != before, f"a number of another block's to rise from {before}")
        me.last_read = address, int(number)
        me.clock.learn(self.released.setdefault(address, Clock()))
        return Value(number.clone())

    def _release(self, address: int, n: int) -> None:
        number = self._number_at(address)
        number.clamp_(min=n)
        self.me().tell(self.released.setdefault(address, Clock()))
        self.machine.pause()


def _name(variables: dict[str, Any]) -> None:
    """Names shared memory after the kernel's variables, for the messages of faults."""
    for name, x in variables.items():
        for i, slot in enumerate(x.slots if isinstance(x, Shared) else ()):
            slot.name = f"{name}[{i}]"
            if slot.barrier is not None:
                slot.barrier.name = slot.name


def _barrier(memory: Shared) -> MBarrier:
    if memory.slot.barrier is None:
        raise HardwareFault(f"{memory.slot.name} is no barrier yet")
    return memory.slot.barrier


def _layout(*arguments: Any, **named: Any) -> str:
    return "layout"


def _on_lanes(text: str, constraints: str, arguments: list[Value], dtype: Any, pack: int) -> Any:
    """Runs PTX on elements [64, columns / 8, 4, 2] in the layout of products. A thread has two columns of one row, then two of the
    row eight further on, and all of its elements are operands at once."""
    arguments = torch.broadcast_tensors(*[x.data for x in arguments])
    shape = arguments[0].shape
    held = [x.reshape(4, 2, 8, -1, 4, 2).permute(0, 3, 1, 5, 2, 4).reshape(4, -1, 32) for x in arguments]
    assert held[0].shape[1] == pack, "a thread's elements are to be operands at once"
    kinds = constraints.split(",")
    n_results = sum(kind.startswith("=") for kind in kinds)
    results = np.zeros((4, n_results, 32), np.uint32)
    for warp in range(4):
        given = np.concatenate([_registers(x[warp]) for x in held])
        registers = [_typed(results[warp, i], kinds[i]) for i in range(n_results)]
        for kind, x in zip(kinds[n_results:], given, strict=True):
            if kind.isdigit():  # shares a result's register
                results[warp, int(kind)] = x
                registers.append(registers[int(kind)])
            else:
                registers.append(_typed(x, kind))
        ptx.run(text, registers)
    found = torch.from_numpy(results.view(np.int32)).unflatten(1, (-1, pack)).unbind(1)
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    back = [x.view(4, -1, 2, 2, 8, 4).permute(0, 2, 4, 1, 5, 3).reshape(shape) for x in found]
    values = [Value(x if kind == gl.int32 else x.view(DTYPES[kind])) for x, kind in zip(back, dtypes, strict=True)]
    return tuple(values) if isinstance(dtype, tuple) else values[0]


def _registers(x: Tensor) -> np.ndarray:
    """[elements, 32] -> [registers, 32] of 32 bits, with two elements in each where they have half precision."""
    if x.element_size() == 4:
        return x.contiguous().view(torch.int32).numpy().view(np.uint32)
    bits = x.contiguous().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    return bits[0::2] | bits[1::2] << 16


def _typed(register: np.ndarray, kind: str) -> np.ndarray:
    return register.view(np.float32) if kind.strip("=") == "f" else register
