"""Runs a Gluon kernel with other meanings for its words, launched as the real one is."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.hopper.machine import Machine
from tests.hopper.memory import Pointer, Tiles
from tests.hopper.values import Value
from tests.hopper.words import Words


class Simulated:
    """Stands in for a Gluon kernel: `Simulated(kernel)[(programs,)](*arguments)`. `at_once` programs run at a time, in an order
    drawn from `seed`; the others begin when these end."""

    def __init__(self, kernel: GluonJITFunction, seed: int, at_once: int) -> None:
        self.kernel, self.seed, self.at_once = kernel, seed, at_once

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self._launch(grid[0], arguments)

    def _launch(self, programs: int, arguments: tuple[Any, ...]) -> None:
        machine = Machine(self.seed)
        named = dict(zip(self.kernel.arg_names, arguments, strict=True))
        tensors = [x.detach() for x in arguments if isinstance(x, torch.Tensor)]
        words = Words(machine, programs, tensors, named.get("DETERMINISTIC", False))
        body = with_words(self.kernel, words.names, {})
        given = [x if p.is_constexpr else _given(x) for x, p in zip(arguments, self.kernel.params, strict=True)]
        machine.run(lambda: body(*given), programs, self.at_once)


def _given(x: Any) -> Any:
    """An argument in the form that a kernel gets it."""
    if isinstance(x, TensorDescriptor):
        return Tiles(x.base, x.block_shape)
    if isinstance(x, torch.Tensor):
        return Pointer(x)
    return None if x is None else Value(torch.tensor(x, dtype=torch.int32 if isinstance(x, int) else torch.float32))


def with_words(function: GluonJITFunction, words: dict[str, Any], done: dict[int, FunctionType]) -> FunctionType:
    """A Gluon function as a Python function, with all that it calls. `done`: the functions made already."""
    if id(function) in done:
        return done[id(function)]
    python = function.fn
    names: dict[str, Any] = {"__builtins__": __builtins__}
    twin = FunctionType(python.__code__, names, python.__name__, python.__defaults__)
    twin.__kwdefaults__ = python.__kwdefaults__
    done[id(function)] = twin
    for name in python.__code__.co_names:
        value = python.__globals__.get(name)
        if name in words:
            names[name] = words[name]
        elif isinstance(value, GluonJITFunction):
            names[name] = with_words(value, words, done)
        elif isinstance(value, gl.constexpr):
            names[name] = value.value
        elif value is not None:
            names[name] = value
    return twin


def on_hopper(
    rung: ModuleType, monkeypatch: pytest.MonkeyPatch, *, seed: int = 0, programs: int = 2, at_once: int | None = None
) -> None:
    """Makes flash_v3, or a copy of it, run on the CPU, as on a GPU of `programs` multiprocessors of which `at_once` are free (None:
    all). The multiprocessors go on in an order drawn from `seed`."""
    monkeypatch.setattr(rung, "unsupported", lambda device, dtype, head_dim, features: None)
    monkeypatch.setattr(rung, "multiprocessors", lambda device: programs)
    for remembered in ("ready", "forward_plan", "backward_plan"):  # without their caches, which would outlast the test
        found = getattr(rung, remembered)
        monkeypatch.setattr(rung, remembered, getattr(found, "__wrapped__", found))
    for name in ("forward_kernel", "backward_kernel"):
        found = getattr(rung, name)
        monkeypatch.setattr(
            rung, name, Simulated(found.kernel if isinstance(found, Simulated) else found, seed, at_once or programs)
        )
