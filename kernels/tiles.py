"""Tile sizes of the Triton kernels, by GPU and head_dim."""

from dataclasses import dataclass

import torch

from kernels.generations import capability


@dataclass(frozen=True)
class Tile:
    """One kernel's launch: rows of queries, rows of keys, warps, and how many tiles ahead the loads run."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """The three kernels of flash_v2."""

    forward: Tile
    dq: Tile
    dkdv: Tile


INTERPRETED = Tiles(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1))


def tiles(device: torch.device, dtype: torch.dtype, head_dim: int) -> Tiles:
    """The tiles for a device; `head_dim` is rounded up to the table's next entry."""
    if device.type != "cuda":
        return INTERPRETED
    return tiles_for(capability(device), dtype, head_dim)


A = Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2))
B = Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2))
C = Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(32, 64, 8, 1))


def tiles_for(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> Tiles:
    return {16: A, 32: A, 64: A, 128: B, 256: C}[max(16, 1 << (head_dim - 1).bit_length())]
