"""One sequence over several devices: each holds successive positions of it, and in attention its share of the heads.

Jacobs et al., "DeepSpeed Ulysses" (2023, https://arxiv.org/abs/2309.14509). All layers but attention treat each position by itself.
Before attention an all-to-all turns S / P positions of all heads into all positions of H / P heads, and after it another one turns
the output back. The kernel between them is the one that a device alone runs, so what it computes has the same bits, whatever its
masks. Letters are those of model/gpt.py, and P is the number of devices that share a sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_ladder.kernels import attention


@dataclass(frozen=True)
class SharedSequence:
    """This process's part of every sequence, in a group of `size` processes that hold one together."""

    group: str  # the name of the process group, which torch.compile takes as a constant
    rank: int  # in the group; the part with that number is this process's
    size: int

    @classmethod
    def over(cls, group: dist.ProcessGroup) -> SharedSequence:
        """The part of this process in `group`, of which it is a member."""
        return cls(group.group_name, group.rank(), group.size())

    def own(self, x: Tensor) -> Tensor:
        """This process's positions of x [B, S, ...]; S must be a multiple of `size`."""
        return x.chunk(self.size, 1)[self.rank]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, alibi_slopes: Tensor | None = None, **meaning: Any) -> Tensor:
        """kernels.attention over all positions: q [B, H, S / P, D], k and v [B, K, S / P, D] -> [B, H, S / P, D].

        H must be a multiple of P. alibi_slopes: of all heads, [H]. meaning: what else attention takes, for all positions, such as
        document_ids [B, S]. Key/value heads that P does not divide are repeated first, so that a process gets those of its queries.
        """
        copies = self.size // math.gcd(k.shape[1], self.size)
        if copies > 1:
            k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        heads = [x.shape[1] // self.size for x in (q, k, v)]
        pieces = [x.transpose(1, 2).unflatten(2, (self.size, -1)).permute(2, 0, 1, 3, 4) for x in (q, k, v)]
        whole = exchange(torch.cat(pieces, 3), self.group).transpose(0, 1).flatten(1, 2)  # [B, S, heads of a process, D]
        if alibi_slopes is not None:
            alibi_slopes = alibi_slopes.chunk(self.size)[self.rank]
        y = attention(*whole.transpose(1, 2).split(heads, 1), alibi_slopes=alibi_slopes, **meaning)  # [B, H / P, S, D]
        parts = exchange(y.transpose(1, 2).unflatten(1, (self.size, -1)).transpose(0, 1), self.group)  # [P, B, S / P, H / P, D]
        return parts.permute(1, 2, 0, 3, 4).flatten(2, 3).transpose(1, 2)


def heads_of_a_device(n_head: int, n_kv_head: int, size: int) -> tuple[int, int]:
    """The query heads and the key/value heads of one attention call, where `size` devices share a sequence."""
    return n_head // size, math.lcm(n_kv_head, size) // size


# torch's own differentiable all-to-all keeps the host busy for longer than a kernel of 16k positions runs. As an operator of ours,
# the exchange passes through torch.compile in one graph, and activation checkpointing repeats it.
@torch.library.custom_op("flash_ladder::exchange", mutates_args=())
def exchange(x: Tensor, group: str) -> Tensor:
    """x [P, ...]: piece p goes to process p of the group with that name; what comes back is a piece from each, in their order."""
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    members = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]  # a GroupName is a str
    dist.all_to_all_single(received, x.contiguous(), group=members)
    return received


@exchange.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _send_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return exchange(grad, ctx.group), None  # piece p came from process p


exchange.register_autograd(_send_back, setup_context=_keep_group)
