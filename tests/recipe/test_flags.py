"""Hydra's flags: what is one, what it takes, and what is said to the rest."""

import pytest
from hydra._internal.utils import get_args_parser

from flash_ladder.errors import UserError
from flash_ladder.flags import SHORT, TAKES, check, split, typed


def test_flags_keep_the_values_that_follow_them():
    flags, others = split(
        ["-m", "seed=1", "--config-dir", "mine", "-cn", "other", "hydra.verbose=true", "--config-path=x", "-i", "a=b"]
    )
    assert flags == {"--multirun": "", "--config-dir": "mine", "--config-name": "other", "--config-path": "x", "--info": "all"}
    assert others == ["seed=1", "hydra.verbose=true", "a=b"]
    assert typed(flags) == ["--multirun", "--config-dir=mine", "--config-name=other", "--config-path=x", "--info=all"]
    assert split(["--info", "defaults"])[0] == {"--info": "defaults"}


def test_they_are_hydras():
    """Hydra reads what passes, and none of its flags is missing but the one that unpickles a file."""
    parser = get_args_parser()
    options = {option: action for action in parser._actions for option in action.option_strings}
    assert options.keys() - {"--experimental-rerun"} == {*TAKES, *SHORT}
    for name, takes in TAKES.items():
        assert (takes == ()) == (options[name].nargs == 0)
        assert not takes or list(takes) == options[name].choices
    assert all(options[short] is options[name] for short, name in SHORT.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--foo", "--foo is not a flag; values have no dashes: foo=VALUE; --help lists them"),
        ("--trainer.max_steps=3", "values have no dashes: trainer.max_steps=3"),
        ("-x", "-x is not a flag"),
        ("--multi", "did you mean --multirun?"),
        ("--", "-- is not a flag"),
        ("--cfg=foo", "--cfg=foo is not a choice (job, hydra, all)"),
        ("--cfg", "--cfg needs a value, as in --cfg=job"),
        ("--cfg -m", "--cfg needs a value"),
        ("--config-name", "--config-name needs a value, as in --config-name=NAME"),
        ("--config-name=", "--config-name needs a value"),
        ("--info=foo", "--info=foo is not a choice (all, config, "),
        ("--help=foo", "--help takes no value"),
        ("--experimental-rerun=x.pkl", "is not a flag"),
        ("--resolve", "--resolve goes with --cfg or --help, as in --cfg=job --resolve"),
        ("--package x", "--package goes with --cfg, as in --cfg=job --package=x"),
        ("--cfg job -m", "--cfg is about one run: leave -m out"),
        ("--cfg job --info", "--cfg and --info exclude each other"),
        ("--shell-completion", "--shell-completion needs install=SHELL"),
    ],
)
def test_a_wrong_flag_is_a_line(arguments, message):
    with pytest.raises(UserError) as refused:
        check(*split(arguments.split(" ")))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_what_goes_together():
    for arguments in ("--cfg job --resolve", "--help --resolve", "--cfg all --package model", "-sc install=bash", "-m", "-r"):
        check(*split(arguments.split(" ")))
