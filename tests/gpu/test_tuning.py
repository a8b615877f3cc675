"""The tuner on a GPU: a small run gives a row that works."""

import torch

from flash_ladder.benchmark.tune_tiles import tune
from flash_ladder.kernels import flash_v2
from flash_ladder.kernels.asked import Asked
from flash_ladder.script_schema import TuneConfig


def test_a_row(tmp_path, capsys):
    out = tmp_path / "rows.txt"
    cfg = TuneConfig(
        head_dim=[64], kernels=["dq"], seq_len=[256], causal=[True], tokens=512, width=128, dtype="float16", milliseconds=2,
        processes=8, out=str(out),
    )  # fmt: skip
    row = tune(cfg)[64]
    assert "D 64   dq" in capsys.readouterr().out and "64: Tiles(forward=Tile(" in out.read_text()
    query = torch.randn(1, 2, 100, 64, device="cuda", dtype=torch.float16)
    output, lse = flash_v2.forward(query, query, query, Asked(0.125), use=row)
    for grad in flash_v2.backward(output, None, query, query, query, output, lse, Asked(0.125), use=row):
        assert grad.isfinite().all()
