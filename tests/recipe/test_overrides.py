"""The command line as it is split, quoted and multiplied."""

import json

import pytest
from omegaconf import OmegaConf

from flash_ladder.errors import UserError
from flash_ladder.overrides import (
    as_typed,
    differing,
    for_hydra,
    for_sweeper,
    is_hydras,
    named,
    one_point,
    parse_override,
    points_of,
    split,
    swept,
)


def test_flags_keep_the_values_that_follow_them():
    typed = ["-m", "seed=1", "--config-dir", "mine", "-cn", "other", "hydra.verbose=true", "--config-path=x"]
    assert split(typed) == (["-m", "--config-dir", "mine", "-cn", "other", "--config-path=x"], ["seed=1", "hydra.verbose=true"])


@pytest.mark.parametrize("text", ["a b", "lr=0.1,b=(2)", "12e4567", "it's", "\\", "${x}", "\\${x}", "ü#[{!;~&", "'quoted'"])
@pytest.mark.parametrize("key", ["prompt", "resume", "sweep"])
def test_text_and_paths_are_taken_as_typed(key, text):
    argument = for_hydra(f"{key}={text}")
    read = OmegaConf.create({key: parse_override(argument).value()})[key]
    assert read == text
    assert as_typed(argument) == f"{key}={text}"


def test_other_values_and_no_value_are_hydras():
    for argument in ("seed=1", "resume=null", "sweep=", "data.files='a b'", "~model"):
        assert for_hydra(argument) == as_typed(argument) == argument
    assert parse_override(for_hydra("prompt=null")).value() == "null"  # the text


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
    assert named("sweep", ["sweep="]) is named("resume", ["sweep=a"]) is None


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
