"""Small tiles for every test of the kernels in Triton's interpreter, so that small sequences cross tiles in both directions."""

import pytest

from flash_ladder.kernels import tiles

SMALL = tiles.Tiles(forward=tiles.Tile(64, 32, 4, 1), dq=tiles.Tile(64, 32, 4, 1), dkdv=tiles.Tile(32, 64, 4, 1))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "interpreted", lambda seq_q, seq_k: SMALL)
