"""The exported folder: what it holds, that it comes back as it was, and a clear line for one that is not whole."""

import errno
import json
import os

import pytest
import safetensors.torch
import torch

from flash_ladder.data.tokenizer import byte_tokenizer
from flash_ladder.errors import UserError
from flash_ladder.export.folder import FILES, load_export, load_windows, read_config, write_export
from flash_ladder.files import replace_folder, write_json
from tests.helpers.made_up import VOCAB, sharp_model

ABOUT = {"training": {"precision": "32"}, "data": {"seq_len": 8}}
WINDOWS = {"tokens": torch.arange(36).view(4, 9), "document_ids": torch.zeros(4, 8, dtype=torch.int32)}


def export_to(out, **parts):
    with replace_folder(out, FILES) as folder:
        write_export(folder, sharp_model(**parts), byte_tokenizer(), WINDOWS, ABOUT)
        write_json(folder / "parity.json", {})
    return out


@pytest.fixture
def exported(tmp_path):
    return export_to(tmp_path / "export")


def refused(message: str, function, *args) -> None:
    with pytest.raises(UserError, match=message) as caught:
        function(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "parts", [{}, {"tie_embeddings": False}, {"position": "learned", "norm": "layernorm", "bias": True, "mlp": "gelu"}]
)
def test_a_model_comes_back_as_it_was(tmp_path, parts):
    model, tokenizer, config = load_export(export_to(tmp_path / "export", **parts))
    before = sharp_model(**parts)
    assert model.cfg == before.cfg and not model.training
    assert tokenizer.fingerprint == byte_tokenizer().fingerprint
    assert config["training"] == ABOUT["training"]
    tokens = WINDOWS["tokens"]
    assert torch.equal(model(tokens), before(tokens))


def test_tied_embeddings_are_stored_once(tmp_path):
    tied, free = (
        safetensors.torch.load_file(export_to(tmp_path / str(tie), tie_embeddings=tie) / "model.safetensors")
        for tie in (True, False)
    )
    assert sum(w.numel() for w in tied.values()) == sharp_model().n_params
    assert sum(w.numel() for w in free.values()) == sharp_model().n_params + VOCAB * 32


def test_windows_come_back_as_they_were(exported):
    windows = load_windows(exported, read_config(exported))
    assert windows.keys() == WINDOWS.keys()
    assert all(torch.equal(rows, WINDOWS[name]) and rows.dtype == WINDOWS[name].dtype for name, rows in windows.items())


def test_the_folder_can_be_read_by_others(exported):
    assert sorted(p.name for p in exported.iterdir()) == sorted(FILES)
    assert len({p.stat().st_mode for p in exported.iterdir()}) == 1


def test_no_code_is_in_it(exported):
    assert not any(b"torch._utils" in p.read_bytes() or p.read_bytes()[:2] == b"PK" for p in exported.iterdir())


# ---- replacing an export ----


def test_an_export_is_replaced_when_the_new_one_is_whole(exported, tmp_path):
    export_to(exported, n_layer=1)
    assert load_export(exported)[0].cfg.n_layer == 1
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_an_error_keeps_the_export_that_was_there(exported, tmp_path):
    with pytest.raises(RuntimeError, match="on the way"), replace_folder(exported, FILES) as folder:
        (folder / "model.safetensors").write_text("half")
        raise RuntimeError("on the way")
    assert load_export(exported)[0].cfg.n_layer == 2
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_what_a_kill_left_is_put_right(exported, tmp_path):
    exported.rename(tmp_path / ".export.old")  # killed after the old folder had gone and before the new one came
    (tmp_path / ".export.new").mkdir()
    with pytest.raises(RuntimeError), replace_folder(exported, FILES):
        raise RuntimeError
    assert load_export(exported)[0].cfg.n_layer == 2
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_rename_that_fails_keeps_the_export_that_was_there(exported, tmp_path, monkeypatch):
    def rename(path, target):
        if path.name.endswith(".new"):
            raise OSError(errno.EIO, "Input/output error")
        os.rename(path, target)

    monkeypatch.setattr(type(exported), "rename", rename)
    refused("cannot be written .Input/output error.; an export that was there before is kept", export_to, exported)
    assert load_export(exported)[0].cfg.n_layer == 2
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_folder_with_other_files_is_never_replaced(exported, tmp_path):
    (exported / "notes.txt").write_text("mine")
    refused(r"holds other files than an export's \(notes.txt\)", export_to, exported)
    (tmp_path / "file").write_text("mine")
    refused("is a file; name a folder", export_to, tmp_path / "file")
    refused("cannot be written", export_to, tmp_path / "file" / "export")
    assert (exported / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"


# ---- folders that are not whole ----


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_missing_file_is_named(exported, name):
    (exported / name).unlink()
    refused(name, load_export, exported)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_changed_file_is_named(exported, name):
    content = bytearray((exported / name).read_bytes())
    content[len(content) // 2] ^= 1
    (exported / name).write_bytes(content)
    refused(f"{name} is damaged: its checksum", load_export, exported)
    (exported / name).write_bytes(content[:100])
    refused(f"{name} is damaged: its checksum", load_export, exported)


def test_changed_or_missing_windows_are_named(exported):
    config = read_config(exported)
    (exported / "validation.safetensors").write_bytes(b"")
    refused("validation.safetensors is damaged", load_windows, exported, config)
    (exported / "validation.safetensors").unlink()
    refused("validation.safetensors is missing", load_windows, exported, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format version 2, and this version of Flash Ladder reads 1"),
        ({"format": "other"}, "was not written by scripts/export.py"),
        ({"sha256": None}, "has no sha256"),
        ({"model": {"d_model": 32, "colour": "red"}}, "describes no model of this version .*colour"),
        ({"model": {"d_model": 32, "n_head": 3, "vocab_size": VOCAB}}, "d_model=32 is not divisible by model.n_head=3"),
        ({"model": {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "d_model": 64, "vocab_size": VOCAB}}, "holds another model: .* is "),
    ],
)
def test_a_config_that_does_not_fit_is_refused(exported, change, message):
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | change))
    refused(message, load_export, exported)


def test_what_is_no_export_is_refused(exported, tmp_path):
    refused("none does not exist", load_export, tmp_path / "none")
    refused(f"did you mean model={exported}", load_export, tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refused(f"it is a run: python scripts/export.py run={tmp_path / 'run'}", load_export, tmp_path / "run")
    (exported / "config.json").write_text("{")
    refused("config.json cannot be read", load_export, exported)


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": [float("nan"), 1.5], "b": {"c": float("inf")}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5], "b": {"c": None}}
    refused("cannot be written", write_json, tmp_path / "none" / "x.json", {})
