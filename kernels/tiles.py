"""Tile sizes of the Triton rungs' kernels, by GPU and head_dim.

flash_v2 has four tables: GPUs with 160 KiB of shared memory per block or more (A100, B200), those with 99 KiB (A10, L4, RTX 30
to 50), Turing with 64 KiB, and Hopper, whose wgmma needs at least 64 rows per warpgroup. Hopper's rows were timed on an H200
(docs/log.md). Tests hold the others to their limits: they fit in shared memory and spill no registers in the inner loops.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import cast

import torch

from .generations import capability


@dataclass(frozen=True)
class Tile:
    """One kernel's launch: rows of queries, rows of keys, warps, and how many tiles the loads run ahead."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int | bool]:
        """The options of a Triton launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Tiles:
    """The three kernels of flash_v2."""

    forward: Tile
    dq: Tile
    dkdv: Tile


# The largest head_dim that a row serves, and its tiles (queries, keys, warps, stages). Hopper's tiles were the fastest of 4 to 8
# over causal and full, 1k to 16k, together. dkdv at 256 spills registers, yet is 2.6 times as fast as the best that does not.
HOPPER = {
    64: Tiles(forward=Tile(64, 64, 4, 3), dq=Tile(64, 64, 4, 3), dkdv=Tile(32, 64, 4, 4)),
    128: Tiles(forward=Tile(64, 64, 4, 3), dq=Tile(128, 64, 8, 3), dkdv=Tile(32, 64, 4, 3)),
    256: Tiles(forward=Tile(128, 64, 8, 2), dq=Tile(128, 32, 8, 2), dkdv=Tile(64, 64, 8, 2)),
}
# A window or documents leave a program few tiles, so that the masked corners of large tiles cost more. At 128 this dq takes 1.41
# times the visible area's share of the dense time; the tile above takes 1.58 times that share, and is 15 % faster dense.
HOPPER_CUT = {**HOPPER, 128: replace(HOPPER[128], dq=Tile(64, 64, 4, 2))}
LARGE = {  # 160 KiB and more
    64: Tiles(forward=Tile(128, 64, 8, 3), dq=Tile(128, 64, 8, 3), dkdv=Tile(32, 64, 4, 3)),
    128: Tiles(forward=Tile(64, 64, 4, 3), dq=Tile(64, 64, 4, 2), dkdv=Tile(64, 64, 8, 2)),
    256: Tiles(forward=Tile(64, 32, 8, 2), dq=Tile(64, 32, 8, 2), dkdv=Tile(32, 32, 8, 1)),
}
SMALL = {  # 99 KiB
    64: Tiles(forward=Tile(128, 64, 8, 2), dq=Tile(64, 64, 4, 2), dkdv=Tile(32, 64, 4, 2)),
    128: Tiles(forward=Tile(64, 64, 4, 2), dq=Tile(64, 64, 8, 2), dkdv=Tile(32, 64, 8, 2)),
    256: Tiles(forward=Tile(64, 32, 8, 2), dq=Tile(32, 32, 4, 1), dkdv=Tile(32, 32, 8, 1)),
}
FLOAT32 = {
    64: Tiles(forward=Tile(32, 32, 4, 1), dq=Tile(32, 32, 4, 1), dkdv=Tile(32, 32, 4, 1)),
    128: Tiles(forward=Tile(32, 32, 8, 1), dq=Tile(32, 32, 8, 1), dkdv=Tile(32, 16, 4, 1)),
    256: Tiles(forward=Tile(16, 16, 8, 1), dq=Tile(16, 16, 8, 1), dkdv=Tile(16, 16, 8, 1)),
}
TURING = {  # 64 KiB, float16, no asynchronous copies
    64: Tiles(forward=Tile(128, 64, 8, 1), dq=Tile(64, 64, 4, 1), dkdv=Tile(32, 64, 4, 1)),
    128: Tiles(forward=Tile(64, 32, 4, 1), dq=Tile(64, 32, 8, 1), dkdv=Tile(32, 32, 4, 1)),
    256: Tiles(forward=Tile(64, 16, 8, 1), dq=Tile(32, 32, 8, 1), dkdv=Tile(16, 32, 8, 1)),
}
INTERPRETED_ROWS = 512  # at most: faster than 256 by a quarter at 1,024 tokens, and 1,024 takes four times its memory


@dataclass(frozen=True)
class TilesV1:
    """The two kernels of flash_v1."""

    forward: Tile
    backward: Tile


# flash_v1 has one table, which fits into Turing's 64 KiB. Its loads must not run ahead (one stage): it reads what it has written.
V1 = {
    64: TilesV1(forward=Tile(64, 64, 4, 1), backward=Tile(64, 32, 4, 1)),
    128: TilesV1(forward=Tile(64, 32, 4, 1), backward=Tile(32, 32, 8, 1)),
    256: TilesV1(forward=Tile(32, 32, 8, 1), backward=Tile(16, 16, 8, 1)),
}
V1_FLOAT32 = {
    64: TilesV1(forward=Tile(32, 32, 4, 1), backward=Tile(32, 32, 4, 1)),
    128: TilesV1(forward=Tile(32, 32, 8, 1), backward=Tile(16, 16, 8, 1)),
    256: TilesV1(forward=Tile(16, 16, 8, 1), backward=Tile(16, 16, 8, 1)),
}


def tiles(device: torch.device, dtype: torch.dtype, head_dim: int, seq_q: int, seq_k: int, cut: bool = False) -> Tiles:
    """The tiles for a tensor's device, dtype, head_dim (up to 256) and lengths. `cut`: whether a window or documents cut it."""
    if device.type == "cpu":
        return interpreted(seq_q, seq_k)
    return _tiles_on(device, dtype, head_dim, cut)


@cache
def _tiles_on(device: torch.device, dtype: torch.dtype, head_dim: int, cut: bool) -> Tiles:
    found = cast("tuple[int, int]", capability(device))  # not None: `launch.refusal` lets only NVIDIA's GPUs pass
    return tiles_for(found, dtype, head_dim, cut)


def tiles_for(capability: tuple[int, int], dtype: torch.dtype, head_dim: int, cut: bool = False) -> Tiles:
    """The tiles for a compute capability of 7.5 or more."""
    if dtype == torch.float32:
        table = FLOAT32
    elif capability == (7, 5):
        table = TURING
    elif capability == (9, 0):
        table = HOPPER_CUT if cut else HOPPER
    elif capability in ((8, 0), (8, 7)) or capability[0] == 10:
        table = LARGE
    else:
        table = SMALL
    return table[min(size for size in table if size >= head_dim)]


def tiles_v1(device: torch.device, dtype: torch.dtype, head_dim: int, seq_q: int, seq_k: int) -> TilesV1:
    """flash_v1's tiles for a tensor's device, dtype, head_dim (up to 256) and lengths."""
    if device.type == "cpu":
        use = interpreted(seq_q, seq_k)
        return TilesV1(use.forward, use.dkdv)
    return tiles_v1_for(dtype, head_dim)


@cache
def tiles_v1_for(dtype: torch.dtype, head_dim: int) -> TilesV1:
    """flash_v1's tiles on any GPU."""
    table = V1_FLOAT32 if dtype == torch.float32 else V1
    return table[min(size for size in table if size >= head_dim)]


def interpreted(seq_q: int, seq_k: int) -> Tiles:
    """The tiles in Triton's interpreter: as large as the sequence, because there programs cost time and numbers hardly do."""
    block_q, block_k = (min(INTERPRETED_ROWS, max(16, 1 << (seq - 1).bit_length())) for seq in (seq_q, seq_k))
    tile = Tile(block_q, block_k, 4, 1)
    return Tiles(forward=tile, dq=tile, dkdv=tile)
