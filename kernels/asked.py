"""What a call asks of attention: one object, built once by `attention`, checked, and handed on to whichever backend runs.

A new argument of attention is a field here and a keyword of `kernels.operation.attention`. The list of features that a backend may
refuse, the operators' schema and what autograd saves all follow from the fields. `Numbers` is the part that a kernel takes as
numbers, in the units that it computes in.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Asked(NamedTuple):
    """Attention's arguments beside query, key and value; `kernels.operation.attention` says what each means.

    `scale` is a number here, never None. The flash rungs take only a positive scale.
    """

    scale: float
    is_causal: bool = False
    window_size: int | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None  # [Hq] float32
    document_ids: Tensor | None = None  # [B, S] int32 or int64
    return_lse: bool = False
    deterministic: bool = False

    def used(self) -> tuple[bool, ...]:
        """Which of FEATURES the call uses, in their order."""
        return (abs(self.scale) > LARGEST_SCALE, *[argument is not None and argument is not False for argument in self[1:]])


# Fused kernels round a row's maximum times the scale to float32, and subtract it from products that are not rounded. Behind a large
# scale nothing after the point is left of the difference.
LARGEST_SCALE = 1024.0
ARGUMENTS = Asked._fields[1:]
FEATURES = ("huge_scale", *ARGUMENTS)  # what a backend may refuse
# Where tensors stand among the fields: autograd saves them apart from the numbers.
TENSORS = tuple(i for i, annotation in enumerate(Asked.__annotations__.values()) if annotation == Tensor | None)


def without_tensors(fields: Sequence[Any]) -> tuple[list[Any], list[Tensor | None]]:
    """The fields of an `Asked` with None for each tensor, and the tensors, in the order of TENSORS."""
    numbers, tensors = list(fields), [fields[i] for i in TENSORS]
    for i in TENSORS:
        numbers[i] = None
    return numbers, tensors


def with_tensors(fields: Sequence[Any], tensors: Sequence[Tensor | None]) -> list[Any]:
    """The fields from which `without_tensors` took these tensors."""
    whole = list(fields)
    for i, tensor in zip(TENSORS, tensors, strict=True):
        whole[i] = tensor
    return whole


class Numbers(NamedTuple):
    """What is asked of attention, as the numbers that the kernels take. A None drops the code that would read it.

    A query sees the keys from `behind` before its own position to `ahead` after it. Scores stay in units of the raw product q·k,
    so that `scale` and the change to base 2 are one multiplication. In these units the cap is softcap / scale.
    """

    scale: float
    behind: int | None
    ahead: int | None
    cap: float | None


def numbers_for_kernels(asked: Asked, seq_q: int, seq_k: int) -> Numbers:
    """What is asked, as numbers for the kernels. `asked.scale` is positive."""
    reach = None if asked.window_size is None else min(asked.window_size, seq_q + seq_k) - 1
    cap = None if asked.softcap is None else asked.softcap / asked.scale
    return Numbers(asked.scale, reach, 0 if asked.is_causal else reach, cap)


class ForBackward(NamedTuple):
    """What a backward reads, in a layout that the kernels read: last strides of 1, and lse [B, Hq, Sq] contiguous."""

    grad_output: Tensor
    grad_lse: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    lse: Tensor


def for_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    asked: Asked,
) -> ForBackward:
    """Copies what the kernels could not read, and clears the upstream gradients of rows that see no key.

    `.sum()` passes back an expanded gradient of last stride 0. A saved-tensor hook may return any layout, and so may whoever merges
    the outputs of a ring. A row that sees no key has zero gradients whatever comes from above: 0 · nan would be nan.
    """
    blind = n_blind(asked, query.shape[2], key.shape[2])
    if blind > 0:
        grad_output = grad_output.clone()
        grad_output[:, :, :blind] = 0.0
        if grad_lse is not None:
            grad_lse = grad_lse.clone()
            grad_lse[:, :, :blind] = 0.0
    tensors = (grad_output, query, key, value, output)
    grad_output, query, key, value, output = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    return ForBackward(
        grad_output, None if grad_lse is None else grad_lse.contiguous(), query, key, value, output, lse.contiguous()
    )


def n_blind(asked: Asked, seq_q: int, seq_k: int) -> int:
    """How many queries, the first ones, see no key: they stand before the first key, out of its reach."""
    before = seq_q - seq_k  # query i stands at i - before
    reach = 0 if asked.is_causal else asked.window_size
    return 0 if reach is None else min(seq_q, before - max(0, reach - 1))
