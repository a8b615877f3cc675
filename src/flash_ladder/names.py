"""The names of attention: this repository's backends, and other people's attention that the benchmark sets beside them.

Schemas, help texts and reports read these tables. The code behind the names is in flash_ladder.kernels and benchmark/peers.py, to
which tests/recipe/test_names.py holds them. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """A backend of flash_ladder.kernels.attention. All of them take masks (a window, packed documents)."""

    purpose: str  # in a line
    is_rung: bool  # a kernel of this repository, in Triton or Gluon; the others are operations of torch


@dataclass(frozen=True)
class Peer:
    """Other people's attention."""

    purpose: str  # in a line
    takes_masks: bool
    modules: tuple[str, ...] = ()  # of its package: where its functions may be, the first that is there is taken; (): PyTorch's own


BACKENDS = {
    "eager": Backend("softmax(Q K^T) V as it is written: stores a score for every pair of positions", is_rung=False),
    "sdpa": Backend("what PyTorch picks for F.scaled_dot_product_attention", is_rung=False),
    "flash_v1": Backend("FlashAttention (2022) in Triton, line by line: O(N) memory", is_rung=True),
    "flash_v2": Backend("FlashAttention-2 in Triton: parallel over the sequence; Turing to Blackwell", is_rung=True),
    "flash_v3": Backend("FlashAttention-3 in Gluon: TMA, wgmma, warp specialisation; Hopper", is_rung=True),
}
PEERS = {
    "fa2": Peer("PyTorch's FlashAttention-2", takes_masks=False),
    "cudnn": Peer("PyTorch's cuDNN kernel", takes_masks=False),
    "efficient": Peer("PyTorch's memory-efficient kernel", takes_masks=False),
    "math": Peer("PyTorch's plain operations", takes_masks=False),
    "flex": Peer("PyTorch's FlexAttention, compiled", takes_masks=True),
    "flash_attn": Peer("the package of FlashAttention-2", takes_masks=True, modules=("flash_attn",)),
    "fa3": Peer("the package of FlashAttention-3", takes_masks=True, modules=("fa3_fwd_interface", "flash_attn_interface")),
    "fa4": Peer("the package of FlashAttention-4", takes_masks=True, modules=("flash_attn.cute",)),
}
CHOICES = ("auto", *BACKENDS)  # auto: the best one for the machine, by kernels.generations
MASKED_PEERS = tuple(name for name, peer in PEERS.items() if peer.takes_masks)


def listing(table: Mapping[str, Backend | Peer], indent: int = 12) -> str:
    """The names of a table with their purposes, a line each, for a help text."""
    lines = []
    for name, entry in table.items():
        modules = getattr(entry, "modules", ())
        lines.append(f"{'':{indent}}{name:12}{entry.purpose}" + (f" ({' or '.join(modules)})" if modules else ""))
    return "\n".join(lines)
