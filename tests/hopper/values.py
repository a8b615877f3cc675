"""What registers hold: a tensor (for a number, one without dimensions) with Triton's arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

DTYPES = {
    gl.float16: torch.float16, gl.bfloat16: torch.bfloat16, gl.float32: torch.float32,
    gl.int16: torch.int16, gl.int32: torch.int32, gl.int64: torch.int64,
}  # fmt: skip
NAMES = {torch_dtype: dtype for dtype, torch_dtype in DTYPES.items()}
Number = bool | int | float


class HardwareFault(AssertionError):
    """A kernel does something that sooner or later makes a GPU give a wrong result or hang."""


def of_both(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Value]:
    """Turns an operation on tensors into one on values and Python's numbers."""
    return lambda x, y: Value(operation(*together(x, y)))


def reflected(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Value]:
    """`of_both` with the number as the first operand."""
    return lambda y, x: Value(operation(*together(x, y)))


def divided(a: Tensor, b: Tensor) -> Tensor:
    """a // b rounded towards zero, as in C and not as in Python."""
    return torch.div(a, b, rounding_mode="trunc")


class Value:
    """A tensor in registers. Layouts mean nothing here: a kernel that asks for one gets a name."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    shape = property(lambda self: list(self.data.shape))
    dtype = property(lambda self: NAMES[self.data.dtype])
    type = property(lambda self: SimpleNamespace(layout="layout"))

    def __index__(self) -> int:
        return int(self.data.item())

    def __bool__(self) -> bool:
        return bool(self.data.item())

    def __getitem__(self, where: tuple[slice | None, ...]) -> Value:
        return Value(self.data[where])

    def to(self, dtype: gl.dtype, bitcast: bool = False) -> Value:
        return Value(self.data.view(DTYPES[dtype]) if bitcast else self.data.to(DTYPES[dtype]))

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.data.reshape(shape))

    def permute(self, order: tuple[int, ...]) -> Value:
        return Value(self.data.permute(order))

    def __neg__(self) -> Value:
        return Value(-self.data)

    __add__, __radd__ = of_both(operator.add), reflected(operator.add)
    __sub__, __rsub__ = of_both(operator.sub), reflected(operator.sub)
    __mul__, __rmul__ = of_both(operator.mul), reflected(operator.mul)
    __truediv__, __rtruediv__ = of_both(operator.truediv), reflected(operator.truediv)
    __floordiv__, __rfloordiv__ = of_both(divided), reflected(divided)
    __mod__, __and__, __or__, __xor__ = of_both(torch.fmod), of_both(operator.and_), of_both(operator.or_), of_both(operator.xor)
    __lshift__, __rshift__ = of_both(operator.lshift), of_both(operator.rshift)
    __lt__, __le__, __gt__, __ge__ = of_both(operator.lt), of_both(operator.le), of_both(operator.gt), of_both(operator.ge)
    __eq__, __ne__, __hash__ = of_both(operator.eq), of_both(operator.ne), None


def tensor(x: Value | Number) -> Tensor:
    """A value's tensor; a Python number becomes one of 32 bits, as in Triton."""
    if isinstance(x, Value):
        return x.data
    return torch.tensor(x, dtype=torch.bool if isinstance(x, bool) else torch.int32 if isinstance(x, int) else torch.float32)


def together(x: Value | Number, y: Value | Number) -> tuple[Tensor, Tensor]:
    """Both in the dtype of their operation: the wider of the two, whichever has dimensions. A Python number takes the other's."""
    a, b = tensor(x), tensor(y)
    if not isinstance(x, Value) and (isinstance(x, int) or b.is_floating_point()):
        return a.to(b.dtype), b
    if not isinstance(y, Value) and (isinstance(y, int) or a.is_floating_point()):
        return a, b.to(a.dtype)
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)
