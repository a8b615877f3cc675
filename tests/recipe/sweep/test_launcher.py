"""Sweeps from the command line to the exit code, over runs that are a few lines of Python in place of training."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import nullcontext

import pytest
from omegaconf import OmegaConf

from flash_ladder.composition import _check_either
from flash_ladder.errors import UserError
from flash_ladder.front_door import front_door
from flash_ladder.schema import Config
from flash_ladder.sweep import launcher, runner
from flash_ladder.sweep.points import Point

# What a run does depends on its seed. It notes when it ran, and on which GPUs.
RUN = textwrap.dedent("""
    import json, os, pathlib, signal, sys, time
    values = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    goes_on = "resume" in values
    folder = pathlib.Path(values["resume"] if goes_on else values["hydra.run.dir"].strip("'"))
    seed = json.loads((folder / "seed").read_text()) if goes_on else int(values["seed"])
    (folder / "seed").write_text(str(seed))
    (folder / "typed").write_text(json.dumps(sys.argv[1:]))
    for name in (".hydra/overrides.yaml", "checkpoints/last.ckpt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()

    def end(code, status, error=None, loss=None):
        metrics = {} if loss is None else {"val/loss": loss}
        (folder / "result.json").write_text(json.dumps({"status": status, "error": error, "metrics": metrics}))
        sys.exit(code)

    started = time.monotonic()
    if seed == 3:
        end(2, "out_of_memory", "no room")
    elif seed == 4:
        print("error: no such file"); sys.exit(2)
    elif seed == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    elif seed == 6 and not goes_on:
        time.sleep(60)
    elif seed == 7:
        signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)
    elif seed == 8:
        sys.exit(2 if goes_on else -signal.SIGTERM % 128)
    elif seed >= 100:
        time.sleep(0.4)
    note = [seed, os.environ["CUDA_VISIBLE_DEVICES"], started, time.monotonic()]
    (folder.parent / f"note{seed}.json").write_text(json.dumps(note))
    end(0, "finished", loss=float(seed))
""")


@pytest.fixture
def train(monkeypatch, tmp_path, capfd):
    """Types `train.py ...` in an empty folder; returns the exit code, what was said, and the points of the sweep in `s`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "TICK", 0.01)
    (tmp_path / "train.py").write_text(RUN)
    launcher.register()

    def call(*arguments, main=lambda cfg, folder: None):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        code = 0
        try:
            front_door("train", Config, main)
        except SystemExit as stop:
            code = stop.code
        record = tmp_path / "s" / "points.json"
        return code, "".join(capfd.readouterr()), json.loads(record.read_text())["points"] if record.exists() else None

    return call


NEW = ("-m", "hydra.sweep.dir=s", "trainer.accelerator=cpu")


def statuses(points):
    return [point["status"] for point in points]


def test_every_point_has_its_own_result_and_the_sweep_goes_on(train, tmp_path):
    code, said, points = train(*NEW, "seed=4,5,3,1", "prompt=it's, ${x}")
    assert code == 1
    assert statuses(points) == ["failed", "killed", "out_of_memory", "finished"]
    assert [point["exit_code"] for point in points] == [2, -9, 2, 0]
    assert points[0]["error"] == "no such file" and "out-of-memory killer" in points[1]["error"]
    assert "seed=4: no such file (s/0/console.log)" in said and "sweep=s" in said
    typed = json.loads((tmp_path / "s" / "3" / "typed").read_text())
    assert "prompt=it's, ${x}" in typed and "hydra.job.num=3" in typed and not any(o.startswith("hydra.sweep") for o in typed)


def test_out_of_memory_is_no_failure(train):
    assert train(*NEW, "seed=1,3")[0] == 0


def test_one_point_is_a_sweep_too(train):
    code, _, points = train(*NEW, "seed=1")
    assert (code, statuses(points)) == (0, ["finished"])


def test_a_second_start_runs_what_is_not_done(train, tmp_path):
    train(*NEW, "seed=1,4")
    (tmp_path / "s" / "0" / "kept").touch()
    (tmp_path / "s" / "1" / "left").touch()
    (tmp_path / "train.py").write_text(RUN.replace("seed == 4", "False"))
    code, _, points = train("sweep=s", "hydra.launcher.at_once=2")
    assert (code, statuses(points)) == (0, ["finished", "finished"])
    assert (tmp_path / "s" / "0" / "kept").exists() and not (tmp_path / "s" / "1" / "left").exists()
    code, said, _ = train("sweep=s")
    assert code == 0 and "console.log" not in said  # nothing ran


def test_a_second_start_takes_no_other_points(train):
    train(*NEW, "seed=1")
    code, said, _ = train("sweep=s", "seed=2")
    assert code == 2 and "only hydra.launcher.KEY=VALUE may be new" in said
    code, said, _ = train(*NEW, "seed=2")
    assert code == 2 and "hydra.sweep.dir=s is not empty" in said
    code, said, _ = train("sweep=none")
    assert (
        code == 2
        and said == "error: sweep=none: there is no sweep here (no none/points.json); name a folder that train.py -m wrote\n"
    )


def test_a_hang_ends_at_the_limit_and_goes_on_from_its_checkpoint(train):
    limit = "hydra.launcher.time_limit=0.02"
    code, said, points = train(*NEW, "seed=6,7", limit, "hydra.launcher.grace=0.3", "hydra.launcher.at_once=2")
    assert code == 1 and statuses(points) == ["timed_out", "timed_out"]
    assert [point["exit_code"] for point in points] == [-15, -9]  # the second did not listen
    assert "still running after hydra.launcher.time_limit=0.02 minutes" in said
    _, _, points = train("sweep=s", "hydra.launcher.time_limit=0.02", "hydra.launcher.grace=0")
    assert statuses(points) == ["finished", "timed_out"]


def test_a_checkpoint_that_cannot_be_gone_on_from_is_left(train, tmp_path):
    train(*NEW, "seed=8")
    record = json.loads((tmp_path / "s" / "points.json").read_text())
    record["points"][0]["status"] = "killed"
    (tmp_path / "s" / "points.json").write_text(json.dumps(record))
    (tmp_path / "train.py").write_text(
        RUN.replace("sys.exit(2 if goes_on else", "end(0, 'finished') if not goes_on else sys.exit(2 or")
    )
    code, _, points = train("sweep=s")
    assert (code, statuses(points)) == (0, ["finished"])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_process_and_keeps_what_is_done(train, tmp_path, signum):
    def send():
        while not (tmp_path / "s" / "1" / "seed").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signum)

    threading.Thread(target=send).start()
    code, said, points = train(*NEW, "seed=1,6,2")
    assert code == 128 + signum and "to go on: python train.py sweep=s" in said
    assert statuses(points) == ["finished", "interrupted", "waiting"]
    code, _, points = train("sweep=s")
    assert (code, statuses(points)) == (0, ["finished"] * 3)
    assert "resume=" in (tmp_path / "s" / "1" / "typed").read_text()


def test_points_run_side_by_side_on_gpus_of_their_own(train, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "gpus_here", lambda: [4, 5])
    code, _, points = train("-m", "hydra.sweep.dir=s", "trainer.devices=1,2", "seed=100,101")
    assert code == 0 and [point["gpus"] for point in points] == [[4], [5], [4, 5], [4, 5]]
    code, _, points = train("-m", "hydra.sweep.dir=t", "seed=100,101,102,103", "trainer.devices=1")
    assert code == 0
    notes = [json.loads(file.read_text()) for file in sorted((tmp_path / "t").glob("note*.json"))]
    together = 0
    for i, (_, gpu, start, end) in enumerate(notes):
        for _, other_gpu, other_start, other_end in notes[:i]:
            if start < other_end and other_start < end:
                together += 1
                assert gpu != other_gpu
    assert together and {gpu for _, gpu, _, _ in notes} == {"4", "5"}


def test_one_that_needs_all_gpus_waits_for_them(train, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "gpus_here", lambda: [0, 1])
    code, _, _ = train("-m", "hydra.sweep.dir=s", "seed=100,101", "trainer.devices=1,auto")
    assert code == 0
    notes = [json.loads((tmp_path / "s" / f"note{seed}.json").read_text()) for seed in (100, 101)]
    assert {note[1] for note in notes} == {"0,1"}  # auto, the last of each seed
    assert notes[0][3] <= notes[1][2] or notes[1][3] <= notes[0][2]


def test_on_the_cpu_one_runs_at_a_time(train, tmp_path):
    train(*NEW, "seed=100,101")
    first, second = (json.loads((tmp_path / "s" / f"note{seed}.json").read_text()) for seed in (100, 101))
    assert first[3] <= second[2] and first[1] == ""


# ---- what is refused before the first point starts ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("model.n_head=4,3,2", "model.n_head=3: model.d_model=128 is not divisible by model.n_head=3"),
        ("model.n_head=3,5 seed=1", "2 of 2 points cannot run, and none was started:\n  model.n_head=3: "),
        ("model.n_head=3 seed=1,2", "error: model.d_model=128 is not divisible by model.n_head=3"),
        ("optimizer.lr=interval(0,1)", "has no list of values: Hydra's own sweeper takes a,b"),
        ("attention=glob(x*)", "attention=glob(x*) matches nothing"),
        ("resume=s seed=1,2", "resume=s goes on with one run, so leave -m out"),
        ("seed=1,2 trainer.accelerator=gpu trainer.devices=3", "PyTorch finds 2 GPUs here"),
        ("seed=1,2 hydra.launcher.at_once=0", "hydra.launcher.at_once=0 must be more than 0"),
        ("seed=1,2 hydra.launcher.time_limit=-1", "hydra.launcher.time_limit=-1.0 must be more than 0"),
        ("seed=1,2 hydra.launcher.at_onec=1", "Key 'at_onec' not in 'ProcessesConfig'"),
        ("seed=1,2 hydra.launcher.at_once=x", "could not be converted to Integer"),
        ("seed=1,2 hydra.sweep.subdir=.", "no folder of its own inside s"),
        ("seed=1,2 hydra/launcher=joblib", "Could not find 'hydra/launcher/joblib'"),
    ],
)
def test_all_points_are_checked_first_and_nothing_is_written(train, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(launcher, "gpus_here", lambda: [0, 1])
    code, said, points = train("-m", "hydra.sweep.dir=s", *arguments.split(" "))
    assert code == 2 and message in said and points is None
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_a_sweep_inside_one_of_several_processes_is_refused(train, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    code, said, _ = train(*NEW, "seed=1,2")
    assert code == 2 and "without torchrun" in said


def test_flags_of_hydras_beside_m(train, capfd):
    assert train("--cfg", "job", "-m")[:2] == (2, "error: --cfg is about one run: leave -m out\n")
    code, said, _ = train("--multirun", "--help", "seed=1,2")
    assert code == 0 and "python train.py sweep=outputs/DATE/TIME" in said


def test_two_sweeps_of_the_same_second_have_folders_of_their_own(train, tmp_path):
    for _ in range(2):
        assert train("-m", "seed=1", "trainer.accelerator=cpu")[0] == 0
    folders = [path.parent for path in tmp_path.glob("outputs/*/*/points.json")]
    assert len(folders) == 2


# ---- what Hydra's sweepers get ----


def test_sweepers_get_the_validation_loss_and_inf_for_a_failure(tmp_path):
    cfg = OmegaConf.create({"seed": 1, "hydra": {"job": {"name": "train"}}})
    assert launcher.returned(Point(0, "0", ["seed=1"], status="failed"), tmp_path, cfg).return_value == math.inf
    (tmp_path / "result.json").write_text(json.dumps({"status": "finished", "metrics": {"val/loss": 2.5}}))
    job = launcher.returned(Point(0, "0", ["seed=1"], status="finished"), tmp_path, cfg)
    assert (job.return_value, job.overrides, job.cfg) == (2.5, ["seed=1"], {"seed": 1})
    assert launcher.returned(Point(0, "0", ["seed=1"], status="timed_out"), tmp_path, cfg).return_value == math.inf


def test_a_point_that_a_sweeper_should_not_have_asked_for_has_failed(train, monkeypatch):
    """A sweeper that searches picks points after the check; another one stands in for it here."""
    monkeypatch.setattr("flash_ladder.composition._check_points", lambda *asked: None)
    code, _, points = train(*NEW, "model.n_head=3,4", "seed=1")
    assert (code, statuses(points)) == (1, ["failed", "finished"])
    assert "d_model=129 would work" in points[0]["error"]


def test_a_search_may_begin_at_a_bad_combination(monkeypatch):
    """What all of its points share has to be good; another point may be."""
    first = OmegaConf.create({"model": {"n_head": 3}})
    for shared, is_refused in (({}, False), ({"data": {"seq_len": 0}}, True)):
        monkeypatch.setattr("flash_ladder.composition._compose", lambda *asked, shared=shared: OmegaConf.create(shared))
        with pytest.raises(UserError, match="n_head=3") if is_refused else nullcontext():
            _check_either("train", first, [], Config)


def test_batches_of_a_sweeper_are_one_sweep(train):
    code, _, points = train(*NEW, "seed=4,1,2", "hydra.sweeper.max_batch_size=1")
    assert (code, statuses(points)) == (1, ["failed", "finished", "finished"])


def test_subdir_names_the_folders(train):
    _, _, points = train(*NEW, "seed=1,2", "hydra.sweep.subdir=abc")
    assert [point["folder"] for point in points] == ["abc", "abc_1"]


def test_a_reference_is_followed_in_every_point(train, tmp_path):
    code, _, points = train(*NEW, "seed=4,1", 'hydra.sweep.subdir="lr=1,${hydra.job.num}"', "model.max_seq_len=${data.seq_len}")
    assert code == 1 and [point["folder"] for point in points] == ["lr=1,0", "lr=1,1"]
    assert 'model.max_seq_len="${data.seq_len}"' in json.loads((tmp_path / "s" / "lr=1,1" / "typed").read_text())
    code, _, points = train("sweep=s")
    assert code == 1 and statuses(points) == ["failed", "finished"]


def test_nothing_loads_torch():
    code = "import sys, flash_ladder.sweep.launcher, flash_ladder.sweep.ending; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
