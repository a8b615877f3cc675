"""scripts/certify.py from a folder to its certificate."""

import json

import pytest

from flash_ladder.certify.command import FILES, certify_model
from flash_ladder.errors import UserError
from flash_ladder.script_schema import CertifyConfig
from tests.helpers import tiny_hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_hf.write(tmp_path_factory.mktemp("model") / "llama")


def config(folder, out, **values):
    cfg = CertifyConfig(
        **{"model": str(folder), "out": str(out), "seq_len": 32, "windows": 2, "tokens": 8, "device": "cpu"} | values
    )
    cfg.validate()
    return cfg


def test_it_writes_a_certificate(folder, tmp_path, capsys):
    assert certify_model(config(folder, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "certified: auto and eager make the same model, to what rounding in float32 does to it" in printed
    assert printed.endswith(f"written to {tmp_path / 'out'}\n") and "argparse.py, 2 windows of 32 tokens, float32, CPU" in printed
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(FILES)
    found = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert found["within"] and all(check["within"] for check in found["checks"].values())
    assert (
        found["a"]["reason"] == "plain causal layers run sdpa (CPU, float32, head_dim 16)"
        and found["a"]["in_transformers"] == "ladder"
    )
    assert f"- auto: {found['a']['reason']}" in (tmp_path / "out" / "certificate.md").read_text()
    assert found["perplexity"].keys() == {"float64", "auto", "eager"} and found["parting"]["n_tokens"] == 8
    assert found["reference"] == "eager attention in float64, on the same weights (CPU)"
    assert found["versions"]["transformers"] and found["text"]["name"] == "argparse.py"


def test_wrong_attention_is_exit_code_1(folder, tmp_path, capsys):
    for _ in range(2):  # an earlier certificate is replaced
        assert certify_model(config(folder, tmp_path / "out", a="sees_one_later_key", b="sdpa")) == 1
    printed = capsys.readouterr().out
    assert "NOT certified: sees_one_later_key and sdpa differ by more than rounding" in printed
    assert "beyond tolerance: sees_one_later_key: mean KL to float64 is " in printed
    assert not json.loads((tmp_path / "out" / "certificate.json").read_text())["within"]


def test_the_card_is_a_markdown_table(folder, tmp_path):
    certify_model(config(folder, tmp_path / "out", a="scale_off_by_1_percent", tokens=0))
    card = (tmp_path / "out" / "certificate.md").read_text()
    tables = [block.splitlines() for block in card.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for rows in tables:
        assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
        assert set(rows[1]) == {"|", "-"}
    assert "**beyond**" in card and "NOT certified" in card and "greedy continuations" not in card


def test_16_bits_say_what_they_hide(folder, tmp_path, capsys):
    assert certify_model(config(folder, tmp_path / "out", a="sdpa", dtype="bfloat16", tokens=0)) == 0
    assert "In bfloat16 that hides small faults, such as a scale off by 1 %: dtype=float32 sees those" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"text": "none.txt"}, r"text=none\.txt cannot be read \(No such file or directory\); name a text file"),
        ({"text": "short.txt"}, r"text=short\.txt is 20 tokens long, and one window of 32 needs 33; seq_len=19 would work"),
        ({"text": "empty.txt"}, r"text=empty\.txt is 0 tokens long, and one window of 32 needs 33$"),
        ({"text": "bytes.txt"}, r"text=bytes\.txt is not text \(its bytes are not UTF-8\)"),
        ({"seq_len": 129}, r"seq_len=129 is more than the 128 positions of model=.*; seq_len=128 would work"),
        ({"out": "taken"}, "holds other files than this command's"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_a_mistake_is_a_line_and_leaves_nothing(folder, tmp_path, monkeypatch, values, says):
    monkeypatch.chdir(tmp_path)
    for name, content in {"short.txt": b"x" * 20, "empty.txt": b"", "bytes.txt": b"\xff\xfe"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=says):
        certify_model(config(folder, values.pop("out", tmp_path / "out"), **values))
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model": None}, "model=FOLDER is missing"),
        ({"a": "eager"}, "a=eager and b=eager are one and the same"),
        ({"dtype": "float64"}, "dtype=float64 is not a choice"),
        ({"windows": 0}, "windows=0 must be at least 1"),
        ({"tokens": -1}, "tokens=-1 must be at least 0"),
    ],
)
def test_values_that_mean_nothing(values, says):
    with pytest.raises(UserError, match=says):
        CertifyConfig(**{"model": "x"} | values).validate()
