"""Evaluate: what export found is found again from the folder alone, and a wrong attention does not find it."""

import json
import shutil

import pytest

import flash_ladder.kernels.sdpa
from flash_ladder.errors import UserError
from flash_ladder.export.evaluate import evaluate_export
from flash_ladder.export.export import export_run
from flash_ladder.files import write_json
from flash_ladder.script_schema import EvaluateConfig, ExportConfig
from tests.helpers.made_up import made_up_run, unscaled


def export(run, out) -> None:
    assert export_run(ExportConfig(run=str(run), out=str(out))) == 0


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export(made_up_run(folder), folder / "out")
    return folder / "out"


def evaluated(model, **options) -> int:
    return evaluate_export(EvaluateConfig(model=str(model), **options))


@pytest.mark.parametrize("options", [{"attention": "eager"}, {}, {"against": "eager"}, {"windows": 3}, {"batch_size": 5}])
def test_an_export_evaluates_as_it_did(exported, options):
    assert evaluated(exported, **options) == 0


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("against", [None, "eager"])
def test_in_any_precision_of_a_cpu(exported, precision, against):
    assert evaluated(exported, attention="sdpa", precision=precision, against=against) == 0


def test_a_precision_of_gpus_is_refused_by_name(exported):
    with pytest.raises(UserError, match="precision=16-mixed needs a GPU; on a CPU 32 and bf16-mixed work"):
        evaluated(exported, precision="16-mixed")


def test_the_folder_is_all_it_needs(tmp_path):
    run = made_up_run(tmp_path)
    export(run, tmp_path / "out")
    for gone in (run, tmp_path / "text", tmp_path / "cache"):
        shutil.rmtree(gone)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert evaluated(tmp_path / "elsewhere", attention="eager") == 0


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"against": "eager"}])
def test_a_wrong_attention_fails_the_evaluation(exported, monkeypatch, capsys, options):
    monkeypatch.setattr(flash_ladder.kernels.sdpa, "attend", unscaled)
    assert evaluated(exported, attention="sdpa", **options) == 1
    assert "|Δ loss| to export (sdpa) is" in capsys.readouterr().out


def test_the_result_is_written(exported, tmp_path):
    evaluated(exported, attention="eager", against="sdpa", windows=4, out=str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["within"] and result["evaluation"]["backend"] == "eager" and len(result["evaluation"]["window_losses"]) == 4
    assert result["parity"]["against"] == "sdpa" and result["parity"]["mean_kl"] < 1e-8
    recorded = json.loads((exported / "parity.json").read_text())["window_losses"]["sdpa"][:4]
    assert result["evaluation"]["loss"] == pytest.approx(sum(recorded) / 4, abs=1e-6)
    with pytest.raises(UserError, match="cannot be written"):
        evaluated(exported, out=str(tmp_path / "none" / "result.json"))


def test_a_text_of_ones_own(exported, tmp_path, capsys):
    text = tmp_path / "my.txt"
    text.write_text(("d1w2 d1w3 " * 20)[: 6 * 32 + 1])  # the last token of a window is the first of the next
    assert evaluated(exported, text=str(text), out=str(tmp_path / "result.json")) == 0
    assert "6 windows of 32 tokens" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["checks"] == {} and result["evaluation"]["n_tokens"] == 6 * 32
    text.write_text("short")
    assert evaluated(exported, text=str(text), against="eager") == 0
    assert "1 window of 4 tokens" in capsys.readouterr().out


def loss_on(exported, tmp_path, text: bytes, **options) -> dict:
    (tmp_path / "my.txt").write_bytes(text)
    assert evaluated(exported, text=str(tmp_path / "my.txt"), out=str(tmp_path / "result.json"), **options) == 0
    return json.loads((tmp_path / "result.json").read_text())["evaluation"]


def test_a_text_is_evaluated_to_its_end(exported, tmp_path, capsys):
    text = b"d1w2 d1w3 " * 20
    window, both = (loss_on(exported, tmp_path, text[:n]) for n in (33, 64))
    assert "1 window of 32 tokens and one of 31" in capsys.readouterr().out
    end = loss_on(exported, tmp_path, text[32:64])
    assert both["n_tokens"] == 63 and both["window_losses"] == pytest.approx([window["loss"], end["loss"]])
    assert both["loss"] == pytest.approx((32 * window["loss"] + 31 * end["loss"]) / 63)
    assert loss_on(exported, tmp_path, text[:64], against="eager", batch_size=1)["n_tokens"] == 63
    assert loss_on(exported, tmp_path, text[:64], windows=1)["n_tokens"] == 32
    assert loss_on(exported, tmp_path, text[:64], windows=2)["n_tokens"] == 63


def test_line_ends_are_evaluated_as_they_are(exported, tmp_path):
    found = [loss_on(exported, tmp_path, b"one line" + end + b"another one") for end in (b"\n", b"\r\n", b"\r")]
    assert [evaluation["n_tokens"] for evaluation in found] == [19, 20, 19]
    assert len({evaluation["loss"] for evaluation in found}) == 3


NO_TEXT = [(None, "cannot be read .No such file"), (b"", "0 tokens"), (b"\xff\xfe\x00", "is not text")]


@pytest.mark.parametrize(("content", "message"), NO_TEXT)
def test_a_text_that_is_none_is_refused(exported, tmp_path, content, message):
    if content is not None:
        (tmp_path / "my.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        evaluated(exported, text=str(tmp_path / "my.txt"))


def test_an_export_without_its_record_is_refused(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "copy")
    (tmp_path / "copy" / "parity.json").unlink()
    with pytest.raises(UserError, match=r"parity\.json is missing"):
        evaluated(tmp_path / "copy")


NO_RECORD = [
    {"rounding": None},
    {"rounding": -1.0},
    {"rounding": "0"},
    {"precision": "foo"},
    {"precision": []},
    {"backend": "x"},
    {"backend": []},
    {"window_losses": {"sdpa": [None] * 12}},
    {"window_losses": {"sdpa": ["1.5"] * 12}},
    {"window_losses": {"sdpa": [1.5] * 11}},
    {"window_losses": {"sdpa": 1.5}},
    {"window_losses": {}},
    {"window_losses": []},
]


@pytest.mark.parametrize("change", NO_RECORD)
def test_a_record_that_is_none_is_refused(exported, tmp_path, change):
    shutil.copytree(exported, tmp_path / "copy")
    record = json.loads((exported / "parity.json").read_text())
    write_json(tmp_path / "copy" / "parity.json", record | change, sealed=True)
    with pytest.raises(UserError, match="holds no finite losses"):
        evaluated(tmp_path / "copy")
    (tmp_path / "copy" / "parity.json").write_text(json.dumps(record | {"loss": 1}))
    with pytest.raises(UserError, match="was changed since export"):
        evaluated(tmp_path / "copy")
    del record["digest"]  # of earlier code
    (tmp_path / "copy" / "parity.json").write_text(json.dumps(record))
    assert evaluated(tmp_path / "copy") == 0
