"""The command line as it is quoted and multiplied."""

import json
import os
import shlex

import pytest
from omegaconf import OmegaConf

from flash_ladder.errors import UserError
from flash_ladder.overrides import (
    absolute,
    as_typed,
    differing,
    for_hydra,
    for_sweeper,
    is_hydras,
    named,
    one_point,
    parse_override,
    plain,
    points_of,
    quoted,
    swept,
    text_keys,
)
from flash_ladder.schema import Config
from flash_ladder.script_schema import GenerateConfig

TEXTS = text_keys(Config)
# Names that a file or folder may have.
NASTY = [
    *("lr=0.1,b=(2)", "12e4567", "2026_11_29", "2e3", "it's", 'a"b', "'quoted'", '"a b"', "a b", " a ", "[a]", "[a,b]", "{a: b}"),
    *("ü ï 漢字", "#1", "a&b|c", "~x", "$HOME", "${HOME}", "${x", "\\${x}", "\\", "a\\", "a\\'b", "null", "true", "1", "a,b", "!x"),
    *(
        "choice(a,b)",
        "glob(*)",
        "range(1,2)",
        "a\tb",
        "@x",
        "-",
        "?",
        "*",
        "a=b=c",
        "x`y`",
        "<>",
        "a\nb",
        "interval(0,1)",
        "\\'",
        "'",
    ),
    *("a;b", "%s"),
]


def read(argument: str) -> str:
    """A text as it reaches the configuration."""
    key, value = argument.partition("=")[0], parse_override(argument).value()
    return OmegaConf.to_container(OmegaConf.create({key: value}), resolve=True)[key]


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("key", ["prompt", "resume", "sweep", "logger.name", "data.files", "data.cache_dir", "+slurm.mem"])
def test_text_and_paths_are_taken_as_typed(key, text):
    if text == "null" and key != "prompt":
        pytest.skip("it means: none")
    if text.startswith("[") and key == "data.files":
        pytest.skip("it is a list")
    argument = for_hydra(f"{key}={text}", TEXTS)
    assert read(argument) == text
    assert as_typed(argument, TEXTS) == f"{key}={text}"
    assert for_hydra(as_typed(argument, TEXTS), TEXTS) == argument


@pytest.mark.parametrize("text", NASTY)
def test_hydras_paths_are_taken_as_typed_but_for_references_and_quotes(text):
    plainly = text if text[0] not in "'\"" else quoted(text)
    argument = for_hydra(f"hydra.run.dir={plainly.replace('${', chr(92) + '${') if plainly == text else plainly}", TEXTS)
    if chr(92) + "${" not in text and text != "null":
        assert read(argument) == text
    assert for_hydra(as_typed(argument, TEXTS), TEXTS) == argument


def test_a_reference_in_hydras_paths_is_followed():
    argument = for_hydra("hydra.run.dir=runs,${a}/lr=0.1", TEXTS)
    value = parse_override(argument).value()
    assert OmegaConf.create({"a": 3, "dir": value}).dir == "runs,3/lr=0.1"


def test_which_keys_hold_text():
    """From the types of the schema: in a script `model` is a path, and in train.py a group."""
    assert TEXTS["logger.tags"] == "a list of texts" and TEXTS["data.files"] == "text or null" and "hydra.run.dir" in TEXTS
    assert {"model", "attention", "seed", "trainer.devices", "trainer.lightning"}.isdisjoint(TEXTS)
    assert text_keys(GenerateConfig).keys() >= {"model", "attention", "prompt", "device"} and "seed" not in text_keys(
        GenerateConfig
    )


def test_other_values_and_no_value_are_hydras():
    for argument in ("seed=1", "resume=null", "sweep=", "~model", "model.max_seq_len=${data.seq_len}", "logger.tags=null", "x"):
        assert for_hydra(argument, TEXTS) == as_typed(argument, TEXTS) == argument
    assert parse_override(for_hydra("prompt=null", TEXTS)).value() == "null"  # the text


def test_lists_of_texts_keep_them():
    assert parse_override(for_hydra("logger.tags=[2026_11_29,2e3, a b ]", TEXTS)).value() == ["2026_11_29", "2e3", "a b"]
    assert parse_override(for_hydra("data.files=[a=1.txt,1e3.txt]", TEXTS)).value() == ["a=1.txt", "1e3.txt"]
    assert parse_override(for_hydra("data.files=['a, b.txt',c.txt]", TEXTS)).value() == ["a, b.txt", "c.txt"]


def test_under_a_sweep_commas_part_texts():
    swept = parse_override(for_hydra("logger.name=2e3,a,2026_11_29", TEXTS, is_sweep=True))
    assert [point for [point] in points_of([swept])] == ["logger.name='2e3'", "logger.name=a", "logger.name='2026_11_29'"]
    for argument in ("attention.backend=eager,sdpa", "attention.backend=glob(flash_*)", "data.files=['a b'],c", "x=1,2"):
        assert for_hydra(argument, TEXTS, is_sweep=True) == argument
    assert parse_override(for_hydra("prompt=a,b", TEXTS, is_sweep=True)).value() == "a,b"
    assert parse_override(for_hydra("data.cache_dir=/a=b", TEXTS, is_sweep=True)).value() == "/a=b"


@pytest.mark.parametrize("argument", ["seed=a(b)", "seed=it's", 'seed=a"b', "seed='", "data.seq_len=${x", "logger.tags=[a(b)]"])
def test_the_quotes_that_are_suggested_work(argument):
    with pytest.raises(UserError, match="cannot be read") as refused:
        parse_override(argument)
    said = str(refused.value)
    [suggested] = shlex.split(said[said.index(", ") + 2 :])
    parse_override(suggested)
    if not argument.startswith("logger"):
        assert read(suggested) == argument.partition("=")[2]


def test_paths_that_a_run_reads_again_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("data.files=a/*.txt") == f"data.files={tmp_path}/a/*.txt"
    assert read(for_hydra(absolute("data.files=[a b.txt,/c.txt]"), TEXTS)) == [f"{tmp_path}/a b.txt", "/c.txt"]
    for argument in ("data.files=/a.txt", "data.cache_dir=~/c", "data.files=null", "resume=a", "data.files=[a(b)]", "seed=1"):
        assert absolute(argument) == argument
    assert os.getcwd() == str(tmp_path)


def test_a_doubled_plus_is_none_where_the_key_is_there():
    assert plain("++resume=a", TEXTS) == "resume=a"
    assert plain("++trainer.lightning.x=1", TEXTS) == "++trainer.lightning.x=1"


def test_a_reference_is_quoted_for_the_sweeper():
    assert for_sweeper("a=${b.c}") == 'a="${b.c}"'
    for argument in ("a=1", "a='${b}'", 'a=${oc.env:"X"}'):
        assert for_sweeper(argument) == argument


@pytest.mark.parametrize(
    ("key", "expected"), [("hydra.sweep.dir", True), ("hydra/launcher", True), ("hydrax", False), ("a.hydra", False)]
)
def test_what_begins_with_hydra_is_hydras(key, expected):
    assert is_hydras(key) == expected


def points(*arguments):
    return points_of([parse_override(argument) for argument in arguments])


def test_points_are_every_combination_the_last_key_fastest():
    assert points("a=1,2", "b=x", "+c.d=range(0,2)") == [[f"a={a}", "b=x", f"+c.d={c}"] for a in (1, 2) for c in (0, 1)]
    assert points("a=[1,2]", "b='x,y'") == [["a=[1,2]", "b='x,y'"]]
    assert points("a=choice(1,2)", "a=3") == [["a=3"]]  # the last word on a key
    assert points() == [[]]


def test_an_interval_has_no_points_and_is_left_to_its_sweeper():
    with pytest.raises(UserError, match="hydra/sweeper=optuna"):
        points("a=interval(0,1)")
    asked = [parse_override(argument) for argument in ("a=1", "b=tag(log,interval(1,2))", "c=choice(5,6)")]
    assert one_point(asked) == ["a=1", "c=5"]


def test_what_sets_points_apart():
    assert differing([["a=1", "b=2"], ["a=1", "b=3"]]) == ["b=2", "b=3"]
    assert differing([["a=1"]]) == [""] and differing([]) == []


def test_the_last_folder_named_counts():
    assert named("sweep", ["sweep=a", "seed=1", "sweep=b"]) == "b"
    assert named("sweep", ["sweep=a", "sweep=null"]) == "a"
    assert named("sweep", ["sweep=null"]) is named("resume", ["sweep=a"]) is None
    with pytest.raises(UserError, match="resume is empty; name the folder"):
        named("resume", ["resume="])


def test_a_sweep_of_somebody_else_brings_values_and_no_code(tmp_path):
    def saved(*overrides):
        (tmp_path / "points.json").write_text(json.dumps({"overrides": overrides}))
        return swept(str(tmp_path), ["sweep=x", *typed])

    typed = ["hydra.launcher.time_limit=5"]
    plain = ["seed=1,2", "model=tiny,gpt2_124m", "hydra.sweep.subdir=${seed}", "hydra.launcher.grace=3", "hydra/sweeper=optuna"]
    assert saved(*plain)[:6] == [*plain, *typed]
    for override in ("hydra.launcher.setup=[evil]", "hydra.sweeper.custom_search_space=evil.f", "+callbacks.x._target_=evil.C"):
        typed = []
        with pytest.raises(UserError, match="where you trust them, type them again after sweep="):
            saved("seed=1,2", override)
        typed = [override]
        assert saved("seed=1,2", override)[:2] == ["seed=1,2", override]
    with pytest.raises(UserError, match="is no list of KEY=VALUE"):
        (tmp_path / "points.json").write_text('{"overrides": 5}')
        swept(str(tmp_path), [])
