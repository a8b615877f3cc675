"""The exported folder: what it holds, that it comes back as it was, and a clear line for one that is not whole."""

import errno
import json
import math
import os

import pytest
import safetensors.torch
import torch

from flash_ladder import files
from flash_ladder.data.tokenizer import byte_tokenizer, train_bpe
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
    refused("cannot be written .Input/output error.; what was there before is kept", export_to, exported)
    assert load_export(exported)[0].cfg.n_layer == 2
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_folder_with_other_files_is_never_replaced(exported, tmp_path):
    (exported / "notes.txt").write_text("mine")
    refused(r"holds other files than this command's \(notes.txt\)", export_to, exported)
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


MODEL = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "d_model": 32, "vocab_size": VOCAB}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format version 2, and this version of Flash Ladder reads 1"),
        ({"format": "other"}, "was not written by scripts/export.py"),
        ({"sha256": None}, "has no sha256"),
        ({"wandb": "x"}, "wandb is not a run that wandb knows"),
        ({"wandb": {"id": 5}}, "wandb is not a run that wandb knows"),
        ({"model": {"d_model": 32, "colour": "red"}}, "describes no model of this version .*colour"),
        ({"model": {"d_model": 32, "n_head": 3, "vocab_size": VOCAB}}, "d_model=32 is not divisible by model.n_head=3"),
        ({"model": {**MODEL, "vocab_size": None}}, "describes no model of this version .vocab_size is None"),
        ({"model": {**MODEL, "vocab_size": "320"}}, "describes no model of this version .vocab_size is '320'"),
        ({"model": {**MODEL, "bias": 1}}, "describes no model of this version .bias is 1"),
        ({"model": {**MODEL, "n_head": True}}, "describes no model of this version .n_head is True"),
        ({"model": {**MODEL, "norm_eps": math.inf}}, "describes no model of this version .norm_eps is inf"),
        ({"model": {**MODEL, "rope_theta": [1]}}, "describes no model of this version .rope_theta is .1"),
        ({"model": {**MODEL, "norm": None}}, "describes no model of this version .norm is None"),
        ({"model": {**MODEL, "n_layer": 10**6}}, "describes no model of this version .it is larger than the [0-9,]* numbers"),
        ({"model": {**MODEL, "d_model": 10**9}}, "describes no model of this version .it is larger than"),
        ({"model": {**MODEL, "vocab_size": 10**15}}, "describes no model of this version .it is larger than"),
        ({"model": {**MODEL, "d_ff": 10**30}}, "describes no model of this version .it is larger than"),
        (
            {"model": {**MODEL, "position": "learned", "max_seq_len": 10**12}},
            "describes no model of this version .it is larger than",
        ),
        ({"model": {**MODEL, "n_layer": 1}}, "holds another model: .* is "),
    ],
)
def test_a_config_that_does_not_fit_is_refused(exported, change, message):
    """With a digest that fits: it may come from anybody."""
    config = json.loads((exported / "config.json").read_text()) | change
    config["digest"] = files._content_digest(config)
    (exported / "config.json").write_text(json.dumps(config))
    refused(message, load_export, exported)


def test_a_changed_config_is_named_and_one_of_earlier_code_has_no_digest(exported):
    text = (exported / "config.json").read_text()
    (exported / "config.json").write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 90000.0'))
    refused("config.json was changed since export", load_export, exported)
    config = json.loads(text)
    del config["digest"]
    (exported / "config.json").write_text(json.dumps(config))
    load_export(exported)


def reseal(exported, name: str) -> None:
    """Makes config.json's checksum of a file that was replaced fit it."""
    config = json.loads((exported / "config.json").read_text())
    config["sha256"][name] = files.checksum(exported / name)
    write_json(exported / "config.json", config, sealed=True)


def test_weights_that_are_no_finite_numbers_are_refused(exported):
    path = exported / "model.safetensors"
    good = safetensors.torch.load_file(path)
    for value in (
        torch.full_like(good["norm.weight"], math.nan),
        torch.full_like(good["norm.weight"], math.inf),
        torch.ones(32).int(),
    ):
        safetensors.torch.save_file(good | {"norm.weight": value}, path)
        reseal(exported, path.name)
        refused("norm.weight is not made of finite numbers", load_export, exported)
    path.write_bytes(b"\xff" * 16)
    reseal(exported, path.name)
    refused("model.safetensors cannot be read", load_export, exported)


def test_a_tokenizer_that_is_not_the_models_is_refused(exported):
    path = exported / "tokenizer.json"
    good = json.loads(path.read_text())
    train_bpe(["".join(map(chr, range(300, 900))) * 3], 400).save(exported)
    reseal(exported, path.name)
    refused("tokenizer.json is another model's: it has 400 tokens, and the model 320", load_export, exported)
    holes = good["model"]["vocab"] | {"!": 5000}
    for change in ({"model": good["model"] | {"vocab": holes}}, {"normalizer": {"type": "Lowercase"}}, {"decoder": None}):
        path.write_text(json.dumps(good | change))
        reseal(exported, path.name)
        refused("is no byte-level tokenizer", load_export, exported)
    for content in ("[]", "{}", '{"model": 5}', "[" * 9999):
        path.write_text(content)
        reseal(exported, path.name)
        refused("is not a tokenizer", load_export, exported)


ROWS = torch.zeros(4, 9, dtype=torch.int32)


@pytest.mark.parametrize(
    "windows",
    [
        {},
        {"tokens": ROWS, "more": ROWS},
        {"tokens": ROWS.float()},
        {"tokens": ROWS[0]},
        {"tokens": ROWS[:0]},
        {"tokens": ROWS[:, :1]},
        {"tokens": ROWS - 1},
        {"tokens": ROWS + VOCAB},
        {"tokens": ROWS, "document_ids": ROWS},
        {"tokens": ROWS, "document_ids": ROWS[:, :8] - 1},
        {"tokens": ROWS, "document_ids": torch.arange(8, 0, -1, dtype=torch.int32).expand(4, 8)},
    ],
)
def test_windows_that_are_none_are_refused(exported, windows):
    windows = {name: rows.clone().contiguous() for name, rows in windows.items()}
    safetensors.torch.save_file(windows, exported / "validation.safetensors")
    reseal(exported, "validation.safetensors")
    refused("holds no windows to evaluate on", load_windows, exported, read_config(exported))


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
