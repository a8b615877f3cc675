"""Names that several rooms read: this repository's backends, other people's attention that the benchmark sets beside them, and
how a run can end.

Schemas, help texts and reports read these tables. The code behind the names is in flash_ladder.kernels and benchmark/peers.py;
tests/recipe/test_names.py checks that the two agree. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# How a run can end, in result.json and in a sweep's record.
FINISHED, OUT_OF_MEMORY, NOT_FINITE, STOPPED, FAILED = "finished", "out_of_memory", "not_finite", "stopped", "failed"
WINDOWS = "validation.safetensors"  # in a run's folder and in an export: the windows that it validates on


@dataclass(frozen=True)
class Backend:
    """A backend of flash_ladder.kernels.attention. All of them take masks (a window, packed documents)."""

    purpose: str  # in a line
    is_kernel: bool = False  # a kernel of this repository, in Triton or Gluon; the others are operations of torch


@dataclass(frozen=True)
class Peer:
    """Other people's attention, which the benchmark sets beside ours."""

    purpose: str  # what it is and whose, in a line
    takes_masks: bool = False
    on_a_cpu: bool = False  # whether a CPU runs the same algorithm: not so for a GPU's kernel
    # Modules that may hold its functions, of which the first one there is taken, with their packages; {}: PyTorch's own.
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages that may bring it, as pip names them."""
        return tuple(package for packages in self.modules.values() for package in packages)


BACKENDS = {
    "eager": Backend("softmax(Q K^T) V as it is written: stores a score for every pair of positions"),
    "sdpa": Backend("what PyTorch picks for F.scaled_dot_product_attention"),
    "flash_v1": Backend("FlashAttention (2022) in Triton, line by line: O(N) memory", is_kernel=True),
    "flash_v2": Backend("FlashAttention-2 in Triton: parallel over the sequence; Turing to Blackwell", is_kernel=True),
    "flash_v3": Backend("FlashAttention-3 in Gluon: TMA, wgmma, warp specialisation; Hopper", is_kernel=True),
}
PEERS = {
    "fa2": Peer("FlashAttention-2 (PyTorch's)"),
    "cudnn": Peer("cuDNN (PyTorch's)"),
    "efficient": Peer("memory-efficient (PyTorch's)"),
    "math": Peer("plain operations (PyTorch's)", on_a_cpu=True),
    "flex": Peer("FlexAttention (PyTorch's)", takes_masks=True),
    "flash_attn": Peer("FlashAttention-2", takes_masks=True, modules={"flash_attn": ("flash-attn",)}),
    "fa3": Peer(
        "FlashAttention-3",
        takes_masks=True,
        modules={"fa3_fwd_interface": ("fa3-fwd",), "flash_attn_interface": ("flash-attn-3",)},
    ),
    "fa4": Peer("FlashAttention-4", takes_masks=True, modules={"flash_attn.cute": ("flash-attn-4", "flash-attn")}),
}
CHOICES = ("auto", *BACKENDS)  # auto: the best one for the machine, by kernels.generations
MASKED_PEERS = tuple(name for name, peer in PEERS.items() if peer.takes_masks)


def is_kernel(name: str) -> bool:
    """Whether a name belongs to a kernel of this repository."""
    return name in BACKENDS and BACKENDS[name].is_kernel


def listing(table: Mapping[str, Backend | Peer], indent: int = 12) -> str:
    """The names of a table with their purposes, one a line, for a help text."""
    lines = []
    for name, entry in table.items():
        modules = getattr(entry, "modules", ())
        lines.append(f"{'':{indent}}{name:12}{entry.purpose}" + (f" ({' or '.join(modules)})" if modules else ""))
    return "\n".join(lines)
