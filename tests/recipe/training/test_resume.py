"""flash_ladder.training.resume: a run that goes on is the run that was not stopped, wherever it was; and what is refused."""

import errno
import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from flash_ladder import files
from flash_ladder.data import split
from flash_ladder.errors import UserError
from flash_ladder.training.checkpoint import AtomicCheckpointIO
from flash_ladder.training.module import GPTModule
from flash_ladder.training.run import train
from tests.helpers.corpora import documents, write_jsonl
from tests.helpers.tiny import metrics, tiny_config, values


def contents(run):
    """The bytes of every file of a run, by its name."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def steps(run):
    return [row["step"] for row in metrics(run)]


def broken_off(monkeypatch, cfg, run, error, *, batch, hook="training_step"):
    """Trains until `hook` gets to that batch, and raises `error` there; a signal is sent instead, and waited for."""
    original = getattr(GPTModule, hook)

    def breaks(self, tokens, index):
        if index == batch:
            if isinstance(error, signal.Signals):
                os.kill(os.getpid(), error)
            else:
                raise error
        return original(self, tokens, index)

    with monkeypatch.context() as patch:
        patch.setattr(GPTModule, hook, breaks)
        with pytest.raises(SystemExit if isinstance(error, signal.Signals) else type(error)):
            train(cfg, run)


# ---- the same run ----


@pytest.fixture(scope="module", params=[1, 2], ids=["accumulate=1", "accumulate=2"])
def whole(request, tmp_path_factory):
    """The configuration and the folder of six steps in one go."""
    folder = tmp_path_factory.mktemp("whole")
    cfg = tiny_config(folder, accumulate=request.param)
    train(cfg, folder / "run")
    return cfg, folder / "run"


def test_inside_a_window_of_accumulation(whole, tmp_path, monkeypatch):
    cfg, run = whole
    broken_off(monkeypatch, cfg, tmp_path, OSError("a worker died"), batch=5 * cfg.trainer.accumulate - 1)
    again(cfg, tmp_path, run)


def test_inside_a_validation(whole, tmp_path, monkeypatch):
    cfg, run = whole
    broken_off(monkeypatch, cfg, tmp_path, OSError("no such file"), batch=1, hook="validation_step")
    again(cfg, tmp_path, run)


def test_at_a_step_that_is_validated(whole, tmp_path, monkeypatch):
    cfg, run = whole
    broken_off(monkeypatch, cfg, tmp_path, signal.SIGTERM, batch=3 * cfg.trainer.accumulate - 1)
    assert 3 not in values(tmp_path, "val/loss")
    again(cfg, tmp_path, run)


def test_after_a_kill_every_step_is_there_once(whole, tmp_path, monkeypatch):
    """No checkpoint is written for a UserError: like a kill, it loses the steps since the last one."""
    cfg, run = whole
    for _ in range(2):
        broken_off(monkeypatch, cfg, tmp_path, UserError("killed"), batch=6 * cfg.trainer.accumulate - 1)
        assert steps(tmp_path)[-2:] == [4, 5]
        cfg = replace(cfg, resume=str(tmp_path))
    again(cfg, tmp_path, run)
    assert steps(tmp_path) == [0, 1, 2, 3, 3, 3, 4, 5, 6, 6]  # at 3: the step, its validation, and the layer measured at the start


def test_in_the_last_validation(whole, tmp_path, monkeypatch):
    """Nothing is left to train: the run is validated, its best is kept, and its report made."""
    cfg, run = whole
    broken_off(
        monkeypatch, replace(cfg, trainer=replace(cfg.trainer, val_every=100)), tmp_path, OSError(), batch=0, hook="validation_step"
    )
    again(cfg, tmp_path, run, of=("train/loss",))
    assert values(tmp_path, "val/loss") == {6: values(run, "val/loss")[6]}
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


def again(cfg, run, whole, of=("train/loss", "val/loss")):
    train(replace(cfg, resume=str(run)), run)
    for name in of:
        assert values(run, name) == values(whole, name), name
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["step"]) == ("finished", 6) and result["metrics"]["val/loss"] == values(whole, "val/loss")[6]


def test_killed_before_its_report(tmp_path, capsys):
    """After the last validation a restart makes the report; after the report nothing is left to do."""
    cfg = tiny_config(tmp_path, max_steps=3)
    run = tmp_path / "run"
    train(cfg, run)
    (run / "result.json").unlink()
    before = metrics(run)
    capsys.readouterr()
    assert train(replace(cfg, resume=str(run)), run) == values(run, "val/loss")[3]
    report = capsys.readouterr().out
    assert f"validation   loss {values(run, 'val/loss')[3]:.4f}" in report and "\nsample" in report and "\nspeed        " in report
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["step"], result["sample"] is None) == ("finished", 3, False)
    assert metrics(run)[:-1] == before  # and one more measurement of an attention layer
    with pytest.raises(UserError, match="nothing is left to do"):
        train(replace(cfg, resume=str(run)), run)


# ---- other batches ----


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (1, 2), (1, 1), (2, 3)])
def test_with_other_batches_no_window_is_read_twice_or_left_out(tmp_path, monkeypatch, batch_size, accumulate):
    read = []
    step = GPTModule.training_step
    monkeypatch.setattr(
        GPTModule, "training_step", lambda self, batch, n: (read.extend(batch["tokens"].tolist()), step(self, batch, n))[1]
    )
    cfg = tiny_config(tmp_path, val_batches=1)
    train(cfg, tmp_path / "whole")
    expected, read[:] = list(read), []
    run = tmp_path / "run"
    train(replace(cfg, trainer=replace(cfg.trainer, max_steps=2)), run)
    trainer = replace(cfg.trainer, max_steps=4, accumulate=accumulate, val_every=1)
    cfg = replace(cfg, data=replace(cfg.data, batch_size=batch_size), trainer=trainer, resume=str(run))
    train(cfg, run)
    train(replace(cfg, trainer=replace(trainer, max_steps=5)), run)
    assert len(read) == 2 * 2 + 3 * batch_size * accumulate
    assert all(one == other for one, other in zip(read, expected, strict=False))
    assert list(values(run, "val/loss")) == [2, 3, 4, 5]


def test_windows_of_another_length_are_said(tmp_path, capsys):
    cfg = tiny_config(tmp_path, max_steps=2, val_every=2)
    train(cfg, tmp_path / "run")
    longer = replace(
        cfg, data=replace(cfg.data, seq_len=32), trainer=replace(cfg.trainer, max_steps=3), resume=str(tmp_path / "run")
    )
    train(longer, tmp_path / "run")
    assert "data.seq_len is 32 and was 16: the windows are cut and shuffled anew" in capsys.readouterr().out


# ---- streams ----


@pytest.fixture
def streaming(tmp_path, monkeypatch):
    """A run of six steps on a stream of two files."""
    monkeypatch.setattr(split, "STREAM_VALIDATION_BYTES", 1000)
    cfg = tiny_config(tmp_path)
    folder = tmp_path / "hub"
    folder.mkdir()
    for i in range(2):
        write_jsonl(folder / f"train-{i}.jsonl", [{"text": text} for text in documents(30, seed=i)])
    return replace(cfg, data=replace(cfg.data, source="hub", files=None, hub_name=str(folder), streaming=True))


def test_a_stream_goes_on_where_it_was(streaming, tmp_path, monkeypatch, capsys):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(streaming, whole)
    broken_off(monkeypatch, streaming, run, signal.SIGTERM, batch=3)
    capsys.readouterr()
    again(streaming, run, whole)
    assert "from its beginning" not in capsys.readouterr().out


@pytest.mark.parametrize("change", ["no place", "seed"])
def test_a_stream_that_is_read_from_its_beginning_says_so(streaming, tmp_path, capsys, change):
    """An earlier version's checkpoint has no place in a stream, and that of another seed has one in another order."""
    run = tmp_path / "run"
    train(replace(streaming, trainer=replace(streaming.trainer, max_steps=3)), run)
    path = run / "checkpoints" / "last.ckpt"
    cfg = replace(streaming, resume=str(run), seed=int(change == "seed"))
    if change == "no place":
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["TextData"]["stream"]
        AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    capsys.readouterr()
    train(cfg, run)
    assert (
        f"read from its beginning, because {path} has no place in it for 1 device and seed={cfg.seed}: " in capsys.readouterr().out
    )
    assert list(values(run, "train/loss")) == [1, 2, 3, 4, 5, 6]


# ---- what is refused changes nothing ----


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of three steps of six."""
    folder = tmp_path_factory.mktemp("stopped")
    cfg = tiny_config(folder)
    train(replace(cfg, trainer=replace(cfg.trainer, max_steps=3)), folder / "run", {".hydra/overrides.yaml": "[]\n"})
    return cfg, folder / "run"


def in_the_way(run, name):
    """A folder where a file is to be written, or a file in place of .hydra."""
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.write_text("x") if name == ".hydra" else path.mkdir()


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.yaml", "environment.json", "validation.safetensors", "train.log", ".hydra"]
)
def test_a_file_that_cannot_be_written(stopped, tmp_path, name):
    cfg, run = stopped
    shutil.copytree(run, tmp_path / "run")
    in_the_way(tmp_path / "run", name)
    refused(replace(cfg, resume=str(tmp_path / "run")), tmp_path / "run", name)


@pytest.mark.parametrize("n_files", [0, 2])
def test_a_full_disk(stopped, tmp_path, monkeypatch, n_files):
    """The bytes of so many files fit."""
    cfg, run = stopped
    shutil.copytree(run, tmp_path / "run")
    for resume in (str(tmp_path / "run"), None):
        left = [None] * n_files

        def sync(path, left=left):
            if not left:
                raise OSError(errno.ENOSPC, "No space left on device")
            left.pop()

        monkeypatch.setattr(files, "sync", sync)
        refused(replace(cfg, resume=resume), tmp_path / ("run" if resume else "new"), "cannot be written .No space left on device")
    assert not contents(tmp_path / "new")


def test_an_argument_that_lightning_refuses(stopped):
    cfg, run = stopped
    trainer = replace(cfg.trainer, lightning={"overfit_batches": -2.5})
    refused(replace(cfg, resume=str(run), trainer=trainer), run, "Lightning refuses it")


def refused(cfg, run, message):
    run.mkdir(exist_ok=True)
    before = contents(run)
    with pytest.raises(UserError, match=message) as caught:
        train(cfg, run, {".hydra/overrides.yaml": "- a=b\n"})
    assert "\n" not in str(caught.value)
    assert contents(run) == before
