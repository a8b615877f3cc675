"""A sweep's record and its folders, the GPUs it lends, and what the end of a process says about a point."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from flash_ladder.errors import UserError
from flash_ladder.schema import TrainerConfig
from flash_ladder.sweep import gpus
from flash_ladder.sweep.ending import close
from flash_ladder.sweep.gpus import Pool, gpus_here, gpus_needed
from flash_ladder.sweep.points import Point, Sweep
from flash_ladder.sweep.process import CONSOLE, PointProcess, command_of, labels, last_error, outcome, still_runs

# ---- the record ----


def begin(folder, *overrides):
    folder.mkdir(exist_ok=True)
    sweep = Sweep.open(folder, ["train.py", "-m"], ["seed=1,2"], go_on=False)
    for number, override in enumerate(overrides):
        sweep.place(number, [override], str(number))
    sweep.save()
    return sweep


def test_the_record_is_what_was_asked_for_and_every_point(tmp_path):
    begin(tmp_path, "seed=1", "seed=2")
    record = json.loads((tmp_path / "points.json").read_text())
    assert (record["command"], record["overrides"]) == (["train.py", "-m"], ["seed=1,2"])
    assert record["points"][1] == {
        "number": 1,
        "folder": "1",
        "overrides": ["seed=2"],
        "status": "waiting",
        "error": None,
        "exit_code": None,
        "seconds": None,
        "gpus": [],
    }


def test_a_sweep_goes_on_only_where_one_is_and_is_asked_to(tmp_path):
    sweep = begin(tmp_path, "seed=1")
    with pytest.raises(UserError, match="still at work in another process"):
        Sweep.open(tmp_path, [], [], go_on=True)
    sweep.lock.release()
    with pytest.raises(UserError, match="holds a sweep; sweep="):
        Sweep.open(tmp_path, [], [], go_on=False)
    sweep.points[0].status = "finished"
    sweep.save()
    again = Sweep.open(tmp_path, ["other"], ["other"], go_on=True)
    assert (again.command, again.overrides) == (["train.py", "-m"], ["seed=1,2"])
    assert again.place(0, ["seed=1"], "0").is_good
    with pytest.raises(UserError, match=r"point 0 of sweep=.* was seed=1, and its sweeper now asks for seed=9"):
        again.place(0, ["seed=9"], "0")


def test_a_record_of_somebody_else_empties_no_folder_outside(tmp_path):
    (tmp_path / "mine").mkdir()
    begin(tmp_path / "sweep", "seed=1").lock.release()
    record = tmp_path / "sweep" / "points.json"
    written = record.read_text()
    for old, new in (('"folder": "0"', '"folder": "../mine"'), ('"status"', '"state"'), ('"points"', '"dots"')):
        record.write_text(written.replace(old, new))
        with pytest.raises(UserError, match=r"is no folder of its own inside|was not written by"):
            Sweep.open(tmp_path / "sweep", [], [], go_on=True)


def test_what_a_point_goes_on_with_is_typed_again_where_it_reaches_code(tmp_path):
    code = ["+callbacks.x._target_=my.Class", "+trainer.lightning.max_epochs=2"]
    point = Point(0, "0", ["seed=1", "prompt='a b'", "callbacks=early_stopping", *code])
    assert command_of(point, ["train.py"], tmp_path, goes_on=True)[-3:] == [f"resume={tmp_path}", *code]


def test_points_never_share_a_folder(tmp_path):
    sweep = begin(tmp_path, "seed=1")
    assert [sweep.place(n, [f"seed={n}"], "abc").folder for n in (1, 2)] == ["abc", "abc_2"]
    for folder in (".", "..", "../elsewhere", "abc/inside", str(tmp_path)):
        with pytest.raises(UserError, match="no folder of its own"):
            sweep.place(3, ["seed=3"], folder)


@pytest.mark.parametrize(
    ("status", "has_checkpoint", "goes_on"),
    [
        ("interrupted", True, True),
        ("killed", True, True),
        ("killed", False, False),
        ("failed", True, False),
        ("waiting", False, False),
    ],
)
def test_what_was_ended_from_outside_goes_on_from_its_checkpoint(tmp_path, status, has_checkpoint, goes_on):
    sweep = begin(tmp_path, "seed=1")
    [point] = sweep.points
    point.status = status
    run = tmp_path / "0"
    for file in ("result.json", ".hydra/overrides.yaml", *(["checkpoints/last.ckpt"] if has_checkpoint else [])):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).touch()
    assert sweep.make_ready(point) == goes_on
    assert not (run / "result.json").exists()  # which would be taken for this start's
    assert (run / "checkpoints").exists() == goes_on
    command = command_of(point, ["train.py"], run, goes_on)
    assert (f"resume={run}" in command) == goes_on and ("seed=1" in command) == (not goes_on)


# ---- GPUs ----


def test_no_gpu_is_lent_twice():
    pool = Pool([0, 1, "GPU-7"])
    first, second = pool.take(2), pool.take(1)
    assert (first, second) == ([0, 1], ["GPU-7"])
    assert pool.take(1) is None
    pool.give_back(first)
    assert pool.take(3) is None and pool.take(2) == [0, 1]
    pool.give_back(second)
    pool.give_back([0, 1])
    assert pool.free == [0, 1, "GPU-7"]


@pytest.mark.parametrize(
    ("visible", "counted", "expected"),
    [(None, 2, [0, 1]), ("3,GPU-a", 2, [3, "GPU-a"]), ("0,1,2", 0, []), ("", 8, []), (" ", 8, []), ("5,6,-1,7", 2, [5, 6])],
)
def test_the_gpus_here_are_as_many_as_pytorch_counts(monkeypatch, visible, counted, expected):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(gpus.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=0, stdout=f"{counted}\n", stderr=""))
    assert gpus_here() == expected


@pytest.mark.parametrize(
    ("asked", "there", "n"),
    [
        ({}, 2, 1),
        ({}, 0, 0),
        ({"devices": 2}, 2, 2),
        ({"devices": "auto"}, 4, 4),
        ({"devices": -1}, 4, 4),
        ({"devices": "2"}, 4, 2),
        ({"devices": 2, "accelerator": "cpu"}, 4, 0),
        ({"devices": 2}, 0, 0),
        ({"context_parallel": 2}, 4, 2),
        ({"context_parallel": 2, "devices": 4}, 4, 4),
    ],
)
def test_how_many_gpus_a_run_takes(asked, there, n):
    assert gpus_needed(TrainerConfig(**asked), there) == n


def test_more_gpus_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"trainer.devices=3: PyTorch finds 2 GPUs here"):
        gpus_needed(TrainerConfig(devices=3), 2)
    with pytest.raises(UserError, match=r"trainer.context_parallel=4: PyTorch finds 2 GPUs here"):
        gpus_needed(TrainerConfig(context_parallel=4), 2)
    with pytest.raises(UserError, match=r"trainer.accelerator=gpu: PyTorch finds no GPU here"):
        gpus_needed(TrainerConfig(accelerator="gpu"), 0)


# ---- what became of a point ----


def write(folder, result=None, console=""):
    (folder / CONSOLE).write_text(console)
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("code", "reason", "result", "expected"),
    [
        (0, None, {"status": "finished"}, ("finished", None)),
        (2, None, {"status": "out_of_memory", "error": "no room"}, ("out_of_memory", "no room")),
        (1, None, {"status": "not_finite", "error": "nan"}, ("not_finite", "nan")),
        (0, None, None, ("finished", None)),
        (143, "timed_out", {"status": "stopped"}, ("timed_out", None)),
        (143, "timed_out", {"status": "finished"}, ("finished", None)),  # in the seconds it was given to end
        (-15, "interrupted", None, ("interrupted", None)),
        (-9, None, None, ("killed", "killed by SIGKILL; the system's out-of-memory killer does so")),
        (-11, None, None, ("killed", "killed by SIGSEGV")),
        (143, None, None, ("stopped", "stopped by SIGTERM")),
        (0, None, {"status": "odd"}, ("finished", None)),
    ],
)
def test_a_status_is_the_results_or_the_exit_codes(tmp_path, code, reason, result, expected):
    write(tmp_path, result)
    assert outcome(code, tmp_path, reason) == expected


def test_a_failure_without_a_result_is_told_in_its_own_words(tmp_path):
    write(tmp_path, console="error: first\nstep 1\rstep 2\nerror: data=text needs data.files=PATH\nbye\n")
    assert outcome(2, tmp_path, None) == ("failed", "data=text needs data.files=PATH")
    write(tmp_path, console="Traceback (most recent call last):\n  File\nRuntimeError: no\n\n")
    assert outcome(1, tmp_path, None) == ("failed", "RuntimeError: no")
    write(tmp_path, console="")
    assert last_error(tmp_path / CONSOLE) is None
    assert outcome(1, tmp_path, None) == ("failed", "exit code 1")


def test_a_folder_is_locked_while_anything_of_its_process_lives(tmp_path):
    assert not still_runs(tmp_path)
    process = PointProcess(Point(0, "0", []), tmp_path, ["-c", "import time; time.sleep(60)"], goes_on=False)
    process.log.close()  # as when the sweep itself is killed
    assert still_runs(tmp_path)
    process.kill()
    process.popen.wait()
    assert not still_runs(tmp_path)


def test_a_process_sees_its_own_gpus_alone_and_leaves_nothing_behind(tmp_path):
    code = (
        "import os, subprocess, sys; print(os.environ['CUDA_VISIBLE_DEVICES']);"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    )
    process = PointProcess(Point(0, "0", [], gpus=[1, "GPU-7"]), tmp_path, ["-c", code], goes_on=False)
    while not process.has_ended():
        pass
    assert process.close() == 0
    visible, child = (tmp_path / CONSOLE).read_text().split()
    assert visible == "1,GPU-7"
    time.sleep(0.2)
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"  # dead, and for its new parent to bury


# ---- the end ----


def test_out_of_memory_is_a_result_and_a_failure_is_not(tmp_path, capsys):
    sweep = begin(tmp_path, "seed=1", "seed=2")
    sweep.points[0].status, sweep.points[1].status = "finished", "out_of_memory"
    sweep.save()
    assert close(tmp_path) == 0
    assert "1 finished, 1 out of memory" in capsys.readouterr().out
    sweep.points[1].status, sweep.points[1].error = "failed", "no such file"
    sweep.save()
    assert close(tmp_path) == 1
    said = capsys.readouterr().out
    assert f"failed       seed=2: no such file ({tmp_path}/1/console.log)" in said and f"sweep={tmp_path}" in said


def test_points_share_wandbs_group_and_are_named_by_what_differs(tmp_path, monkeypatch):
    for name in ("WANDB_RUN_GROUP", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "2026-11-30" / "04-00-00"
    folder.mkdir(parents=True)
    sweep = Sweep.open(folder, ["train.py"], [], go_on=False)
    points = [sweep.place(n, ["attention=eager", f"data.seq_len={length}"], str(n)) for n, length in enumerate((64, 128))]
    name = sweep.names()[1]
    assert "128" in name
    assert labels(points[1], sweep) == ["logger.group=2026-11-30/04-00-00", f"logger.name={name}"]
    monkeypatch.setenv("WANDB_NAME", "mine")
    assert labels(points[1], sweep) == ["logger.group=2026-11-30/04-00-00"]
    points[1].overrides.append("logger.group=g")
    assert labels(points[1], sweep) == []
