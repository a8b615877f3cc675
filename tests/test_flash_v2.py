"""How flash_v2 numbers its programs: each tile of each head once, whatever the order, and the same result."""

import pytest
import torch

from kernels import flash_v2
from tests.reference import check, documents, make_case, n_unlike, run

pytestmark = pytest.mark.filterwarnings("ignore:flash_v")

MEANINGS = {
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window_size": 40},
    "documents": {"document_ids": documents(100, (20, 70), (10, 50))},
}


def test_grid():
    """The last axes hold 65,535 programs; batch entries or, under a mask, tiles beyond that go onto the first."""
    assert flash_v2.numbered(3, 4, 2, cut=False) == ((3, 4, 2), "tiles")
    assert flash_v2.numbered(3, 4, 2, cut=True) == ((4, 3, 2), "heads")
    assert flash_v2.numbered(70_000, 4, 2, cut=False) == ((70_000, 4, 2), "tiles")
    assert flash_v2.numbered(65_535, 4, 65_535, cut=True) == ((4, 65_535, 65_535), "heads")
    assert flash_v2.numbered(65_536, 4, 2, cut=True) == ((524_288, 1, 1), "flat")
    assert flash_v2.numbered(1, 1, 70_000, cut=False) == flash_v2.numbered(1, 1, 70_000, cut=True) == ((70_000, 1, 1), "flat")


@pytest.mark.parametrize("name", MEANINGS)
def test_every_order_means_the_same(name, monkeypatch):
    """Two batch entries of grouped heads over several tiles."""
    case = make_case(2, 4, 2, 100, 100, 16, torch.float32)
    check(case, "flash_v2", **MEANINGS[name])
    as_numbered = run(case, torch.float32, backend="flash_v2", **MEANINGS[name])
    monkeypatch.setattr(flash_v2, "AXIS", 1)
    assert flash_v2.numbered(2, 4, 2, cut=True)[1] == "flat"
    assert n_unlike("flash_v2", as_numbered, run(case, torch.float32, backend="flash_v2", **MEANINGS[name])) == 0
