"""Checkpoints: whole or not at all, read as plain data, and a clear line for everything else."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch

from flash_ladder.errors import UserError
from flash_ladder.model.weights import load_weights
from flash_ladder.training.checkpoint import AtomicCheckpointIO, load_run, load_to_go_on, read_checkpoint
from tests.helpers.disk import disk_with
from tests.helpers.made_up import STEP, made_up_run, sharp_model

IO = AtomicCheckpointIO()


def refused(message: str, function, *args) -> None:
    with pytest.raises(UserError, match=message) as caught:
        function(*args)
    assert "\n" not in str(caught.value)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    IO.save_checkpoint({"weights": torch.arange(5000.0), "step": 1, "names": ["a"]}, path)
    return path


def test_what_is_saved_is_read_back(saved):
    read = IO.load_checkpoint(saved)
    assert read["step"] == 1 and read["names"] == ["a"] and torch.equal(read["weights"], torch.arange(5000.0))
    assert [p.name for p in saved.parent.iterdir()] == ["last.ckpt"]
    IO.remove_checkpoint(saved)
    IO.remove_checkpoint(saved)  # and once more, when it is gone
    assert not saved.exists()


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("boom",))

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.ckpt")
    refused("cannot be read", IO.load_checkpoint, tmp_path / "bomb.ckpt", None, False)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.99, 0.9999])
def test_a_truncated_checkpoint_is_refused(saved, share):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    refused("last.ckpt (cannot be read: it was|is damaged: it was changed or) cut short", read_checkpoint, saved)


def test_a_checkpoint_that_is_missing_empty_or_something_else_is_refused(tmp_path, saved):
    refused("there is no checkpoint .*none.ckpt", read_checkpoint, tmp_path / "none.ckpt")
    (tmp_path / "empty.ckpt").touch()
    refused("is empty", read_checkpoint, tmp_path / "empty.ckpt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint\n" * 100)
    refused("is not a checkpoint", read_checkpoint, tmp_path / "text.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    refused("holds no dictionary", read_checkpoint, tmp_path / "list.ckpt")


@pytest.mark.parametrize("has_digest", [True, False])  # earlier ones have none
def test_no_flipped_bit_gets_through(saved, has_digest):
    good = read_checkpoint(saved)
    if not has_digest:
        torch.save(good, saved)
    whole = saved.read_bytes()
    directory = whole.index(b"PK\x01\x02")
    flips = [(i, 4) for i in range(0, directory, 61)] + [(i, bit) for i in range(directory, len(whole), 3) for bit in (i % 8, 4)]
    caught = 0
    for position, bit in flips:
        saved.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
        for mmap in (False, True):
            try:
                read = read_checkpoint(saved, mmap=mmap)
            except UserError:
                caught += 1
            else:  # a byte that nothing reads
                assert torch.equal(read["weights"], good["weights"]) and read["step"] == 1, (position, bit)
    assert caught > (1.98 if has_digest else 1.3) * len(flips)


def test_what_torch_takes_for_a_folder_is_refused(saved):
    """The directory of an archive, less its digest: a tensor's entry with a folder's attribute, of which torch reads nothing."""
    torch.save(read_checkpoint(saved), saved)
    whole = saved.read_bytes()
    entry = whole.rindex(b"/data/0") - whole[: whole.rindex(b"/data/0")][::-1].index(b"PK\x01\x02"[::-1]) - 4
    saved.write_bytes(whole[: entry + 38] + b"\x10" + whole[entry + 39 :])
    refused("is damaged: its directory has an entry that torch does not write, .*/data/0", read_checkpoint, saved)


def test_numbers_of_another_machine_and_nothing_at_all_are_refused(saved):
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(saved.with_name("big.ckpt"), "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, b"big" if entry.filename.endswith("byteorder") else old.read(entry))
            new.infolist()[-1].external_attr = 0
    refused("is damaged: its numbers are not little-endian", read_checkpoint, saved.with_name("big.ckpt"))
    IO.save_checkpoint({}, saved)
    refused("holds no dictionary, or an empty one", read_checkpoint, saved)


def test_others_read_it_too(saved):
    for mmap in (False, True):
        assert torch.equal(torch.load(saved, mmap=mmap)["weights"], torch.arange(5000.0))
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None


def test_a_full_disk_keeps_the_old_checkpoint(saved):
    before = saved.read_bytes()
    with disk_with(bytes_left=100_000):
        refused(
            r"last.ckpt cannot be written \(File too large.*untouched", IO.save_checkpoint, {"weights": torch.zeros(10**6)}, saved
        )
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    refused("cannot be written .Not a directory", IO.save_checkpoint, {}, tmp_path / "file" / "a" / "b.ckpt")


KILLED_SAVES = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from flash_ladder.training.checkpoint import AtomicCheckpointIO, read_checkpoint

    def written():  # bytes of the file that is being saved
        try:
            return saving.stat().st_size
        except FileNotFoundError:
            return 0

    path = Path(sys.argv[1]) / "last.ckpt"
    saving = path.with_name(".last.ckpt.saving")
    io, size, halfway = AtomicCheckpointIO(), 30_000_000, 0
    io.save_checkpoint({"step": 0, "weights": torch.zeros(1000)}, path)
    for step in range(1, 9):
        child = os.fork()
        if child == 0:
            io.save_checkpoint({"step": step, "weights": torch.ones(size // 4)}, path)
            os._exit(0)
        ended = (0, 0)
        while ended == (0, 0) and written() <= size * step // 10:
            ended = os.waitpid(child, os.WNOHANG)
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        halfway += 0 < written() < size
        assert read_checkpoint(path)["step"] in (0, step), step
        if read_checkpoint(path)["step"] == step:  # the save was faster than the kill: begin again
            io.save_checkpoint({"step": 0, "weights": torch.zeros(1000)}, path)
    io.save_checkpoint({"step": 9}, path.with_name("best.ckpt"))
    print(halfway, sorted(p.name for p in path.parent.iterdir()))
"""


def test_a_killed_save_leaves_the_old_checkpoint_whole(tmp_path):
    script = [sys.executable, "-c", textwrap.dedent(KILLED_SAVES), tmp_path]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    halfway, files = done.stdout.split(" ", 1)
    assert int(halfway) >= 3  # kills that met a file half written
    assert files.strip() == "['best.ckpt', 'last.ckpt']"  # what they left is gone after the next save


# ---- a run's checkpoint ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_up_run(tmp_path_factory.mktemp("made_up"))


def test_a_run_is_read(run):
    config, weights, info = load_run(run, "best")
    assert config["data"]["seq_len"] == 32
    net = sharp_model()
    assert weights.keys() == net.state_dict().keys()
    assert all(torch.equal(w, weights[name]) for name, w in net.state_dict().items())
    assert info["step"] == STEP and info["checkpoint"] == str(run / "checkpoints" / "best.ckpt")
    assert 0 < info["val_loss"] != 9.0  # the one of its own step
    assert load_run(run, str(run / "checkpoints" / "last.ckpt"))[2]["step"] == STEP


def test_the_validation_loss_is_the_last_one_of_that_step(run):
    metrics = run / "metrics.jsonl"
    before = metrics.read_text()
    try:
        metrics.write_text(before + json.dumps({"step": STEP, "val/loss": 1.25}) + "\n" + '{"step": 6, "val/lo')  # torn by a kill
        assert load_run(run)[2]["val_loss"] == 1.25
        metrics.unlink()
        assert load_run(run)[2]["val_loss"] is None
    finally:
        metrics.write_text(before)


def test_what_is_no_run_is_refused(run, tmp_path):
    refused("does not exist; name a folder", load_run, tmp_path / "none")
    refused(f"is not a run .*did you mean run={run}", load_run, run.parent)
    (tmp_path / "checkpoints").mkdir()
    refused("has no checkpoint best.ckpt; training stopped before", load_run, tmp_path)
    IO.save_checkpoint({"state_dict": {}}, tmp_path / "checkpoints" / "last.ckpt")
    refused("has no checkpoint best.ckpt; checkpoint=last is there", load_run, tmp_path)
    refused("was not written by this version of train.py .'hyper_parameters'", load_run, tmp_path, "last")
    refused("checkpoint=bset is not a choice.*did you mean best", load_run, run, "bset")


def test_a_configuration_that_is_none_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for text in ("a: &a [1]\nmodel: *a\n", "!!python/name:os.system", "[" * 9999, "model: 5", "", "- 1", "\x00", "#" * (1 << 21)):
        (tmp_path / "run" / "config.yaml").write_text(text)
        refused("config.yaml is not what train.py wrote", load_run, tmp_path / "run")


def test_a_damaged_or_missing_last_checkpoint_gives_way_to_the_best(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    last, best = (tmp_path / "run" / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    assert load_to_go_on(tmp_path / "run")[2]["checkpoint"] == str(last)
    for damage in (b"", last.read_bytes()[:-1], last.read_bytes()[:900], b"text"):
        last.write_bytes(damage)
        capsys.readouterr()
        assert load_to_go_on(tmp_path / "run")[2]["checkpoint"] == str(best)
        assert re.match(rf".*last.ckpt .*; best.ckpt, of step {STEP}, takes its place\n$", capsys.readouterr().out)
    last.unlink()  # a run that is killed between its first two checkpoints has only the best
    assert load_to_go_on(tmp_path / "run")[2]["checkpoint"] == str(best)
    assert capsys.readouterr().out.endswith(f"no checkpoint last.ckpt; best.ckpt, of step {STEP}, takes its place\n")
    last.write_bytes(b"text")
    best.write_bytes(b"")
    refused("last.ckpt cannot be read", load_to_go_on, tmp_path / "run")


def test_another_runs_checkpoint_is_refused(run, tmp_path):
    other = made_up_run(tmp_path, d_model=48, n_head=3)
    refused("is from another model: its n_head is 3, and 2 in", load_run, run, str(other / "checkpoints" / "best.ckpt"))


@pytest.mark.parametrize("change", [{"d_model": 48}, {"n_layer": 3}, {"n_layer": 1}, {"mlp": "gelu"}, {"tie_embeddings": False}])
def test_weights_of_another_model_are_refused(change):
    there = {"d_model": 48, "n_head": 3, "n_kv_head": 3} if "d_model" in change else change
    refused("x.ckpt holds another model: ", load_weights, sharp_model(), sharp_model(**there).state_dict(), "x.ckpt")
