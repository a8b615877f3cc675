"""The tuner: which candidates it considers, what it makes of timings, and what it says without a GPU; timing needs a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash_ladder.benchmark.tune_tiles import Candidate, candidates, describe_ranking, rows, tune
from flash_ladder.errors import UserError
from flash_ladder.kernels import flash_v2, tiles
from flash_ladder.kernels.asked import Asked
from flash_ladder.kernels.tiles import Tile, Tiles
from flash_ladder.script_schema import TuneConfig

KIB = 1024


def test_candidates_hold_what_the_tables_have():
    """Each tile of a 16-bit table is among the candidates for its GPU."""
    tables = ((tiles.HOPPER, 227), (tiles.LARGE, 163), (tiles.SMALL, 99))
    for table, shared in tables:
        for head_dim, row in table.items():
            for kernel in ("forward", "dq", "dkdv"):
                assert getattr(row, kernel) in candidates(kernel, head_dim, shared * KIB, (1, 2, 3, 4)), (kernel, head_dim, shared)


def test_candidates_fit():
    small, large = (candidates("dkdv", 128, shared * KIB, (1, 2)) for shared in (64, 227))
    assert small and set(small) < set(large)
    assert Tile(128, 128, 4, 1) not in large  # its accumulators alone would need 512 registers a thread
    assert {tile.num_stages for tile in candidates("forward", 64, 64 * KIB, (1,))} == {1}


def test_the_best_has_the_highest_geometric_mean():
    even = Candidate(Tile(64, 64, 4, 3), {(True, 1024): 200.0, (True, 4096): 200.0})
    lopsided = Candidate(Tile(128, 64, 8, 3), {(True, 1024): 100.0, (True, 4096): 390.0})
    assert even.score == pytest.approx(200) and lopsided.score == pytest.approx(197.48, abs=0.01)
    assert Candidate(Tile(64, 64, 4, 3)).score == 0
    line = describe_ranking(64, "dq", [even, lopsided], before=lopsided.tile)
    assert line == "D 64   dq       64,64,4,3 200 (200-200)  128,64,8,3 197 (100-390) now"


def test_rows_are_those_of_the_table():
    written = rows(tiles.HOPPER, "a GPU")
    assert written.startswith("# a GPU\n")
    body = "{" + "".join(written.splitlines()[1:]) + "}"
    assert eval(body, {"Tiles": Tiles, "Tile": Tile}) == tiles.HOPPER


def test_tiles_to_use_instead_of_the_tables():
    query, key, value = (torch.randn(1, 1, 40, 16) for _ in range(3))
    use = Tiles(*[Tile(16, 16, 4, 1)] * 3)
    expected = flash_v2.forward(query, key, value, Asked(0.25))
    found = flash_v2.forward(query, key, value, Asked(0.25), use=use)
    backward = [torch.ones_like(query), None, query, key, value, *expected]
    grads = [flash_v2.backward(*backward, Asked(0.25), use=tiles) for tiles in (None, use)]
    for a, b in zip((*expected, *grads[0]), (*found, *grads[1]), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(expected[0], found[0]) and not torch.equal(grads[0][1], grads[1][1])  # another order of summing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernels": ["dkv"]}, "kernels=dkv is not a choice .*did you mean dkdv"),
        ({"head_dim": [96]}, "head_dim=96 must be 16 to 256, and width=2048 a whole number of heads"),
        ({"seq_len": []}, "seq_len=\\[\\] leaves nothing to time"),
        ({"dtype": "float32"}, "dtype=float32 is not a choice"),
    ],
)
def test_checks(change, message):
    with pytest.raises(UserError, match=message):
        TuneConfig(**change).validate()


def test_without_a_gpu():
    with pytest.raises(UserError, match="PyTorch finds none here"):
        tune(TuneConfig())


def test_help(tmp_path):
    script = Path(__file__).parents[3] / "scripts" / "tune_tiles.py"
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "python scripts/tune_tiles.py out=tiles.txt" in done.stdout
