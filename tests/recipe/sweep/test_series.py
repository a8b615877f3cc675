"""What the pictures show: exponents, lengths that ran out of memory, speed-ups and scaling."""

import pytest

from flash_ladder.sweep.rows import read_sweep
from flash_ladder.sweep.series import pictures
from flash_ladder.units import GIB
from tests.helpers.made_up_runs import made_up_sweep, write_run

SETTING = {"backend": "flash_v3", "seq_len": 4096, "batch_size": 8, "accumulate": 1}


def of(folder):
    """The panels of each picture, by the picture's name."""
    return {picture.name: picture.panels for picture in pictures(read_sweep(folder))}


def line(panel, name):
    return next(line for line in panel.lines if line.name == name)


def test_exponents_of_one_sequence(tmp_path):
    layer = of(made_up_sweep(tmp_path))["memory"][1]
    assert [line.name for line in layer.lines] == ["eager", "sdpa", "flash_v2"]
    assert line(layer, "eager").law.exponent == pytest.approx(2) and line(layer, "sdpa").law.exponent == pytest.approx(1)
    assert line(layer, "flash_v2").law.exponent == pytest.approx(1)
    assert line(layer, "flash_v2").points == pytest.approx({n: n * 8192 for n in (1024, 2048, 4096, 8192)})
    assert line(layer, "eager").law.lengths == (2048, 4096, 8192)


def test_a_cross_where_memory_ran_out(tmp_path):
    peak = of(made_up_sweep(tmp_path))["memory"][0]
    eager = line(peak, "eager")
    assert list(eager.points) == [1024, 2048, 4096] and eager.lost == (8192,)
    needed = eager.crosses()[8192]
    assert needed == pytest.approx(eager.law.bytes(8192)) and needed > 50 * GIB
    assert line(peak, "sdpa").lost == ()


def test_a_cross_without_a_line_to_continue(tmp_path):
    for number, status in enumerate(["finished", "out_of_memory"]):
        measured = {"memory/peak_gib": 3.0}
        setting = SETTING | {"seq_len": 1024 * (1 + number)}
        write_run(tmp_path / str(number), setting=setting, measured=measured, status=status)
    (found,) = of(tmp_path)["memory"][0].lines
    assert found.points == {1024: 3 * GIB} and found.crosses() == {2048: None}


def test_speedups_leave_the_baseline_out(tmp_path):
    whole, layer = of(made_up_sweep(tmp_path))["speedup"]
    assert whole.title == "a whole run, over eager" and [line.name for line in whole.lines] == ["sdpa", "flash_v2"]
    assert list(line(whole, "flash_v2").points) == [1024, 2048, 4096]
    assert line(layer, "flash_v2").points[4096] == pytest.approx(7)


def scaled(folder):
    """DDP and FSDP on two and four devices, beside one device; FSDP is 10 % slower."""
    for number, (strategy, n) in enumerate([("auto", 1), ("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4)]):
        speed = 100.0 * n * (0.9 if strategy == "fsdp" else 1.0)
        setting = SETTING | {"n_devices": n, "strategy": strategy}
        write_run(folder / str(number), setting=setting, measured={"speed/tokens_per_second": speed})
    return folder


def test_scaling_is_a_line_for_each_strategy(tmp_path):
    speeds, efficiency = of(scaled(tmp_path))["scaling"]
    assert [line.name for line in speeds.lines] == ["flash_v3, ddp", "flash_v3, fsdp"]
    assert speeds.lines[0].points == {1: 100, 2: 200, 4: 400}
    assert efficiency.lines[1].points == pytest.approx({1: 1.0, 2: 0.9, 4: 0.9})
    assert "one device" in efficiency.title


def test_no_scaling_with_one_number_of_devices(tmp_path):
    assert [name for name in of(made_up_sweep(tmp_path))] == ["memory", "speed", "speedup", "loss"]


def test_variants_of_a_backend_are_lines_of_their_own(tmp_path):
    for number, (head, n) in enumerate([(4, 1024), (4, 2048), (8, 1024), (8, 2048)]):
        setting = SETTING | {"seq_len": n, "batch_size": 8192 // n}
        write_run(tmp_path / str(number), setting=setting, measured={"memory/peak_gib": 1.0}, overrides=[f"model.n_head={head}"])
    assert [line.name for line in of(tmp_path)["memory"][0].lines] == ["flash_v3, n_head=4", "flash_v3, n_head=8"]


def test_the_batch_tells_runs_apart_where_nothing_else_does(tmp_path):
    for number, batch in enumerate([4, 8]):
        write_run(tmp_path / str(number), setting=SETTING | {"batch_size": batch}, measured={"memory/peak_gib": 1.0})
    assert [line.variant for line in of(tmp_path)["memory"][0].lines] == ["batch=4x1", "batch=8x1"]


def test_losses_by_run(tmp_path):
    training, validation = of(made_up_sweep(tmp_path, backends=("sdpa", "flash_v2"), lengths=(1024, 2048)))["loss"]
    assert [line.name for line in training.lines] == [f"{b}, S={n}" for b in ("sdpa", "flash_v2") for n in (1024, 2048)]
    assert list(training.lines[0].points) == [1, 2, 3, 4] and list(validation.lines[0].points) == [4]


def test_one_run(tmp_path):
    found = of(made_up_sweep(tmp_path, backends=("flash_v2",), lengths=(2048,)))
    assert found["memory"][1].lines[0].law is None and list(found["memory"][1].lines[0].points) == [2048]


def test_many_runs_of_one_length_are_no_line(tmp_path):
    for number in range(12):
        write_run(tmp_path / str(number), setting=SETTING, measured={"memory/peak_gib": 1.0}, overrides=[f"seed={number}"])
    assert list(of(tmp_path)) == ["loss"]
