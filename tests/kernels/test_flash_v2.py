"""How flash_v2 numbers its programs: each tile of each head once, and the same result where CUDA's axes are too short."""

import pytest
import torch

from flash_ladder.kernels import launch
from tests.helpers.reference import check, documents, make_case, n_unlike, run

pytestmark = pytest.mark.filterwarnings("ignore:flash_v")

MEANINGS = {
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window_size": 40},
    "documents": {"document_ids": documents(100, (20, 70), (10, 50))},
}


def test_grid():
    """The second and third axis hold 65,535 programs; the first 2³¹."""
    assert launch.grid(3, 4, 2) == ((3, 4, 2), False)
    assert launch.grid(70_000, 65_535, 65_535) == ((70_000, 65_535, 65_535), False)
    assert launch.grid(2, 65_536, 3) == ((393_216, 1, 1), True)
    assert launch.grid(2, 3, 65_536) == ((393_216, 1, 1), True)


@pytest.mark.parametrize("name", MEANINGS)
def test_one_axis_means_the_same(name, monkeypatch):
    """Two batch entries of grouped heads over several tiles."""
    case = make_case(2, 4, 2, 100, 100, 16, torch.float32)
    check(case, "flash_v2", **MEANINGS[name])
    three_axes = run(case, torch.float32, backend="flash_v2", **MEANINGS[name])
    monkeypatch.setattr(launch, "AXIS", 1)
    assert launch.grid(2, 2, 2) == ((8, 1, 1), True)
    assert n_unlike("flash_v2", three_axes, run(case, torch.float32, backend="flash_v2", **MEANINGS[name])) == 0
