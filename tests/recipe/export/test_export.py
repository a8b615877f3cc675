"""Export: the right model passes, a wrong one does not, nothing is swapped without a word, and an export is never lost."""

import json
import math
import os

import pytest
import safetensors.torch
import torch

import flash_ladder.export.export
import flash_ladder.kernels.eager
import flash_ladder.kernels.sdpa
from flash_ladder.errors import UserError
from flash_ladder.export.export import export_run
from flash_ladder.files import checksum, write_json
from flash_ladder.script_schema import ExportConfig
from tests.helpers.made_up import STEP, made_up_run, unscaled


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_up_run(tmp_path_factory.mktemp("made_up"))


def export(run, tmp_path, **options) -> int:
    return export_run(ExportConfig(run=str(run), **{"out": str(tmp_path / "out"), **options}))


def parity(tmp_path):
    return json.loads((tmp_path / "out" / "parity.json").read_text())


def test_the_export_says_what_it_found(run, tmp_path):
    assert export(run, tmp_path) == 0
    found, exported = parity(tmp_path), tmp_path / "out"
    assert found["within"] and found["backend"] == "sdpa" and found["against"] == "eager" and found["precision"] == "32"
    assert found["n_tokens"] == 12 * 32 and [len(w) for w in found["window_losses"].values()] == [12, 12]
    assert found["perplexity"]["eager"] == pytest.approx(math.exp(found["loss"]["eager"]))
    assert found["checks"]["|Δ loss| to training"]["value"] < 1e-6
    config = json.loads((exported / "config.json").read_text())
    assert config["training"]["step"] == STEP and config["training"]["attention"] == "sdpa"
    assert config["training"]["checkpoint"] == "best.ckpt"  # no path of this machine
    assert str(exported) not in (exported / "config.json").read_text()


def test_the_tables_are_aligned(run, tmp_path, capsys):
    export(run, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.startswith("loss (nats per token)"))
    assert len(head.split()) == 7  # four words, then training, sdpa, eager
    assert lines[-1] == f"exported to {tmp_path / 'out'}"


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_a_wrong_attention_fails_the_export(run, tmp_path, monkeypatch, capsys, precision):
    monkeypatch.setattr(flash_ladder.kernels.sdpa, "attend", unscaled)
    assert export(run, tmp_path, precision=precision) == 1
    assert "beyond tolerance: |Δ loss| is " in capsys.readouterr().out
    assert not parity(tmp_path)["within"] and parity(tmp_path)["checks"]["mean KL"]["within"] is False


def test_weights_that_changed_on_the_way_fail_the_export(run, tmp_path, monkeypatch, capsys):
    """Both backends agree on them; what training recorded tells."""
    write = flash_ladder.export.export.write_export

    def damage(folder, model, *rest):
        with torch.no_grad():
            model.embedding.weight *= 1.01
        write(folder, model, *rest)

    monkeypatch.setattr(flash_ladder.export.export, "write_export", damage)
    assert export(run, tmp_path) == 1
    assert "beyond tolerance: |Δ loss| to training is" in capsys.readouterr().out


def test_what_is_evaluated_was_read_from_the_disk(run, tmp_path, monkeypatch):
    def damage(folder, model, *rest):
        write(folder, model, *rest)
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        safetensors.torch.save_file({name: w * 1.5 for name, w in weights.items()}, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        config["sha256"]["model.safetensors"] = checksum(folder / "model.safetensors")
        write_json(folder / "config.json", config, sealed=True)

    write = flash_ladder.export.export.write_export
    monkeypatch.setattr(flash_ladder.export.export, "write_export", damage)
    assert export(run, tmp_path) == 1


def test_a_flash_run_from_a_gpu_is_not_interpreted_unasked(tmp_path, capsys):
    run = made_up_run(tmp_path, attention="flash_v2", gpu="NVIDIA H200")
    assert export(run, tmp_path) == 0
    said = capsys.readouterr().out
    assert "note: the model was trained with flash_v2 on NVIDIA H200, and that is not compared here: a CPU would only" in said
    assert "attention=flash_v2" in said
    found = parity(tmp_path)
    assert found["backend"] == found["against"] == "eager" and list(found["checks"]) == ["|Δ loss| to training"]
    assert export(run, tmp_path, attention="flash_v2", windows=1) == 0
    assert parity(tmp_path)["backend"] == "flash_v2"


def test_a_rung_that_no_cpu_interprets_is_not_promised(tmp_path, capsys):
    run = made_up_run(tmp_path, attention="flash_v3", gpu="NVIDIA H200")
    assert export(run, tmp_path) == 0
    said = capsys.readouterr().out
    assert "not compared here: attention backend flash_v3 cannot run here: flash_v3 is written in Gluon" in said
    assert "does so all the same" not in said and parity(tmp_path)["backend"] == "eager"


def test_a_backend_that_cannot_run_here_is_said_or_refused(tmp_path, capsys):
    run = made_up_run(tmp_path, attention="flash_v2", n_head=4)  # head_dim 8
    assert export(run, tmp_path) == 0
    assert "is not compared here: attention backend flash_v2 cannot run here" in capsys.readouterr().out
    assert parity(tmp_path)["backend"] == "eager"
    with pytest.raises(UserError, match="flash_v2 cannot run here"):
        export(run, tmp_path, attention="flash_v2")


def test_without_a_backend_eager_is_held_against_training(tmp_path, monkeypatch):
    run = made_up_run(tmp_path, attention="eager")
    assert export(run, tmp_path) == 0
    assert parity(tmp_path)["checks"]["|Δ loss| to training"]["within"]
    monkeypatch.setattr(flash_ladder.kernels.eager, "attend", lambda q, k, v, asked: (v.repeat_interleave(2, 1), None))
    assert export(run, tmp_path) == 1


def test_precision_is_the_trainings(tmp_path):
    run = made_up_run(tmp_path, precision="bf16-mixed")
    assert export(run, tmp_path) == 0
    found = parity(tmp_path)
    assert found["precision"] == "bf16-mixed" and found["rounding"] > 1e-7
    assert found["checks"]["mean KL"]["limit"] == pytest.approx(3 * found["rounding"], rel=0.1)
    assert export(run, tmp_path, precision="32") == 0
    assert parity(tmp_path)["rounding"] == 0
    assert "|Δ loss| to training" not in parity(tmp_path)["checks"]  # that was another arithmetic


@pytest.mark.parametrize("options", [{"windows": 5}, {"seq_len": 16}])
def test_other_windows_are_not_held_against_training(run, tmp_path, options):
    assert export(run, tmp_path, **options) == 0
    assert parity(tmp_path)["n_tokens"] == {"windows": 5 * 32, "seq_len": 12 * 16}[next(iter(options))]
    assert "|Δ loss| to training" not in parity(tmp_path)["checks"]


def test_windows_are_those_that_several_devices_validated_on(tmp_path):
    run = made_up_run(tmp_path)
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"n_devices": 2}))
    export(run, tmp_path)
    assert parity(tmp_path)["n_tokens"] == 8 * 32  # 3 batches of 4 for 2 devices: one batch each
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["config"]["trainer"]["context_parallel"] = 2
    torch.save(checkpoint, run / "checkpoints" / "best.ckpt")
    export(run, tmp_path)
    assert parity(tmp_path)["n_tokens"] == 12 * 32  # both devices read the same windows


def test_text_that_changed_is_refused(tmp_path):
    run = made_up_run(tmp_path)
    (tmp_path / "text" / "0000.txt").write_text("something else " * 50)
    with pytest.raises(UserError, match="is another one on this machine"):
        export(run, tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_keeps_the_one_before(run, tmp_path, monkeypatch):
    export(run, tmp_path)
    before = (tmp_path / "out" / "parity.json").read_bytes()

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(flash_ladder.export.export, "compare", killed)
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path)
    assert (tmp_path / "out" / "parity.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["environment.json", "config.yaml", "tokenizer.json"])
def test_a_run_that_is_not_whole_is_refused(tmp_path, name):
    run = made_up_run(tmp_path)
    (run / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        export(run, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_truncated_checkpoint_keeps_the_export_too(tmp_path):
    run = made_up_run(tmp_path)
    export(run, tmp_path)
    before = (tmp_path / "out" / "parity.json").read_bytes()
    best = run / "checkpoints" / "best.ckpt"
    os.truncate(best, best.stat().st_size // 2)
    with pytest.raises(UserError, match=r"best\.ckpt cannot be read: it was cut short"):
        export(run, tmp_path)
    assert (tmp_path / "out" / "parity.json").read_bytes() == before
