"""Runs become rows: what was written is read, what is damaged costs a line, and what differs is told."""

import json
import shutil
from pathlib import Path

import pytest

from flash_ladder.errors import UserError
from flash_ladder.sweep.rows import read_sweep
from flash_ladder.sweep.run_files import curve
from tests.helpers.made_up_runs import made_up_sweep, write_run

EARLIER = Path(__file__).parents[1] / "earlier_run"
SETTING = {"backend": "sdpa", "seq_len": 512, "batch_size": 8, "accumulate": 1, "n_devices": 1}


def test_a_sweep_in_the_ladders_order(tmp_path):
    sweep = read_sweep(made_up_sweep(tmp_path))
    assert [(row.backend, row.seq_len) for row in sweep.rows] == [
        *((backend, n) for backend in ("eager", "sdpa", "flash_v2") for n in (1024, 2048, 4096, 8192)),
        ("flash_v3", 1024),
    ]
    assert sweep.keys == [] and sweep.warnings == [] and sweep.baseline == "eager"
    assert (sweep.machines, sweep.dates) == (["NVIDIA H200"], ["2026-11-30"])
    assert sweep.commands == ["train.py -m attention=flash_v2,eager,sdpa"]


def test_the_figures_of_a_run(tmp_path):
    row = next(r for r in read_sweep(made_up_sweep(tmp_path)).rows if (r.backend, r.seq_len) == ("flash_v2", 2048))
    assert (row.batch_size, row.accumulate, row.n_devices, row.strategy) == (8, 1, 1, "auto")
    assert (row.tokens_per_second, row.mfu, row.val_loss) == pytest.approx((3e5, 0.3, 3.125))
    assert (row.attention_gib, row.saved_gib, row.saved_ratio) == pytest.approx((0.125, 1.875, 16))
    assert row.joules_per_token == 0.004 and row.status == "finished" and row.error is None and row.has_run


def test_speed_over_the_run_of_the_same_other_settings(tmp_path):
    made_up_sweep(tmp_path)
    found = {(r.backend, r.seq_len): r.speedup for r in read_sweep(tmp_path).rows}
    assert found["flash_v2", 1024] == pytest.approx(3) and found["sdpa", 1024] == pytest.approx(2) and found["eager", 1024] == 1
    assert found["flash_v2", 8192] is None  # eager has no speed there
    found = {(r.backend, r.seq_len): r.speedup for r in read_sweep(tmp_path, "sdpa").rows}
    assert found["flash_v2", 8192] == pytest.approx(1.5)
    with pytest.raises(UserError, match=r"baseline=flash_v3 has no run whose speed .* eager, sdpa, flash_v2$"):
        read_sweep(tmp_path, "flash_v3")


def test_other_settings_are_not_compared(tmp_path):
    for number, (backend, head) in enumerate([("eager", 4), ("sdpa", 8)]):
        measured = {"speed/tokens_per_second": 10.0}
        write_run(
            tmp_path / str(number), setting=SETTING | {"backend": backend}, measured=measured, overrides=[f"model.n_head={head}"]
        )
    sweep = read_sweep(tmp_path)
    assert [row.differs for row in sweep.rows] == [{"model.n_head": "4"}, {"model.n_head": "8"}]
    assert [row.speedup for row in sweep.rows] == [1, None]


def test_out_of_memory_and_a_point_without_a_run(tmp_path):
    rows = read_sweep(made_up_sweep(tmp_path)).rows
    (lost,) = [row for row in rows if row.status == "out_of_memory"]
    assert (lost.backend, lost.seq_len, lost.error) == ("eager", 8192, "CUDA ran out of memory")
    assert (rows[-1].backend, rows[-1].seq_len, rows[-1].status) == ("flash_v3", 1024, "failed")
    assert rows[-1].error == "flash_v3 needs <Hopper> & more" and not rows[-1].has_run


def test_the_status_of_a_point_counts_for_more(tmp_path):
    made_up_sweep(tmp_path)
    points = json.loads((tmp_path / "points.json").read_text())
    points["points"][0] |= {"status": "timed_out", "error": "an hour is over"}
    points["points"][1] |= {"status": "running"}  # a sweep that was killed; its run has ended since
    (tmp_path / "points.json").write_text(json.dumps(points))
    rows = {row.folder: row for row in read_sweep(tmp_path).rows}
    assert (rows["0"].status, rows["0"].error, rows["1"].status) == ("timed_out", "an hour is over", "finished")


def test_an_earlier_run(tmp_path):
    shutil.copytree(EARLIER / "run", tmp_path / "deep" / "er" / "run")
    (row,) = read_sweep(tmp_path).rows
    assert (row.backend, row.seq_len, row.batch_size, row.precision, row.n_devices) == ("sdpa", 32, 2, "32", 1)
    assert row.val_loss == pytest.approx(5.54294, abs=1e-5) and row.saved_ratio == pytest.approx(7.34028, abs=1e-5)
    assert (row.status, row.step, row.folder) == ("finished", 6, "deep/er/run")
    assert read_sweep(tmp_path / "deep" / "er" / "run").rows[0].folder == "."
    assert list(curve(tmp_path / "deep" / "er" / "run", "val/loss")) == [3, 6]


def test_a_killed_run_is_unfinished(tmp_path):
    shutil.copytree(EARLIER / "run", tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text("\n".join(log.read_text().splitlines()[:-2]) + '\n{"step": 6, "tra')
    sweep = read_sweep(tmp_path)
    assert (sweep.rows[0].status, sweep.rows[0].step, sweep.warnings) == ("unfinished", 5, [])


def test_damage_costs_a_line_each(tmp_path):
    made_up_sweep(tmp_path)
    (tmp_path / "0" / "result.json").write_text("[" * 10**5)
    (tmp_path / "1" / "environment.json").write_text("[]")
    (tmp_path / "2" / "config.yaml").write_text("a: [")
    (tmp_path / "3" / "metrics.jsonl").write_bytes(b"\xff\n{}\n")
    (tmp_path / "3" / "result.json").unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text('{"loss": 1}')
    sweep = read_sweep(tmp_path)
    assert len(sweep.rows) == 13 and len(sweep.warnings) == 5, "\n".join(sweep.warnings)
    assert sum("result.json is not a run's" in line for line in sweep.warnings) == 1


@pytest.mark.parametrize("wrong", ["text", None, [1], {"loss": 1}, True, 1e400])
def test_values_of_the_wrong_kind_are_not_known(tmp_path, wrong):
    measured = {"val/loss": wrong, "speed/tokens_per_second": wrong}
    write_run(tmp_path / "0", setting=SETTING | {"seq_len": wrong, "n_devices": wrong}, measured=measured)
    (tmp_path / "0" / "config.yaml").write_text("data: 3\ntrainer: [1]\n")
    (row,) = read_sweep(tmp_path).rows
    assert (row.val_loss, row.tokens_per_second, row.seq_len, row.n_devices) == (None, None, None, None)


def test_points_of_the_wrong_kind_are_left_out(tmp_path):
    made_up_sweep(tmp_path)
    (tmp_path / "points.json").write_text('{"points": [3, {"folder": null}, {"folder": "9", "overrides": "x", "status": 3}]}')
    sweep = read_sweep(tmp_path)
    assert len(sweep.rows) == 12 and len(sweep.warnings) == 2


def test_nothing_to_show(tmp_path):
    with pytest.raises(UserError, match=r"holds no run .* name a folder that train.py wrote, or one above it"):
        read_sweep(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        read_sweep(tmp_path / "none")
