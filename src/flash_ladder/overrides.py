"""The command line: what is Hydra's, what is text to be taken as it is, and which points a sweep over it has."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from flash_ladder.errors import UserError, first_line
from flash_ladder.files import plain_yaml, read_json
from flash_ladder.schema import Config

AS_TYPED = ("prompt", "resume", "sweep")  # any text, or a path: Hydra's grammar has no say in the value
SWEEP = {"-m", "--multirun"}
WITH_VALUE = {"--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"}  # flags whose value is the next argument
ONE_RUN = {"--cfg", "-c", "--info", "-i", "--run", "-r", "--shell-completion", "-sc"}  # flags that Hydra does not take beside -m
HELP = {"--help", "-h", "--hydra-help"}

# What a saved override may name beside the keys of schema.Config, and those of its keys that reach other code: classes of
# callbacks, arguments of Lightning, lines of a job's shell script.
SAVED_GROUPS = ("experiment", "hydra/launcher", "hydra/sweeper")
SAVED_HYDRA = ("hydra.sweep.dir", "hydra.sweep.subdir", *(f"hydra.launcher.{key}" for key in ("time_limit", "grace", "at_once")))
REACHES_CODE = ("callbacks.", "trainer.lightning", "slurm.")
REACHES_NONE = ("trainer.lightning={}", "slurm.submit=false")

KEYS = {field.name for field in fields(Config)}
GROUPS = KEYS - {"seed", "resume", "prompt"}

# ---- arguments ----


def split(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags, with the values that follow them, and the overrides."""
    flags: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flags.append(argument)
        if argument in WITH_VALUE:
            flags += itertools.islice(rest, 1)
    return flags, overrides


def is_hydras(key: str) -> bool:
    """Whether a key or group is Hydra's own: hydra.sweep.dir, hydra/launcher."""
    return re.split("[./]", key)[0] == "hydra"


def asks_for_a_sweep(flags: Iterable[str], overrides: Iterable[str]) -> bool:
    """Whether Hydra would run several points: -m, or the mode by its name."""
    return not SWEEP.isdisjoint(flags) or "hydra.mode=MULTIRUN" in overrides


def quoted(text: str) -> str:
    """Any text as a quoted value for Hydra, which gives spaces, quotes, commas and ${ a meaning."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no interpolation
    text = re.sub(r"(\\*)('|\Z)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), text)
    return f"'{text}'"


def for_hydra(argument: str) -> str:
    """Quotes the value of an argument that is taken as typed: any text, or a path."""
    key, equals, text = argument.partition("=")
    given = equals and (key == "prompt" or text not in ("", "null"))
    return f"{key}={quoted(text)}" if key in AS_TYPED and given else argument


def as_typed(override: str) -> str:
    """What a user types for an override in Hydra's grammar; `for_hydra` undone."""
    key, _, text = override.partition("=")
    if key not in AS_TYPED or not text.startswith("'"):
        return override
    value = str(parse_override(override).value())  # in which Hydra leaves the backslashes before ${ to OmegaConf
    return f"{key}=" + re.sub(r"(\\*)\\\$\{", lambda start: start[1][: len(start[1]) // 2] + "${", value)


def for_sweeper(argument: str) -> str:
    """Quotes a value that begins with a reference to another, ${data.seq_len}: Hydra's sweeper would take its braces for text."""
    key, _, value = argument.partition("=")
    return f'{key}="{value}"' if value.startswith("${") and '"' not in value else argument


def parse_override(argument: str, loader: ConfigLoader | None = None) -> Override:
    """One argument of the command line as Hydra reads it; `loader` knows the groups that glob() looks into.

    Raises UserError where Hydra cannot read it, saying what to type instead.
    """
    key, equals, value = argument.partition("=")
    if not equals and not argument.startswith("~"):
        raise UserError(f"{argument} is not KEY=VALUE; --help lists the keys")
    try:
        [override] = OverridesParser.create(config_loader=loader).parse_overrides([argument])
    except HydraException:
        typed = f"'{key}=\"{value}\"'"
        raise UserError(f"{argument} cannot be read: such a value needs quotes that the shell leaves on, {typed}") from None
    if not override.is_sweep_override() and override.value() == "???":
        raise UserError(f"{argument} says that the value is missing; give one")
    return override


# ---- the points of a sweep ----


def points_of(asked: list[Override]) -> list[list[str]]:
    """Every point of a sweep over lists of values, in the order of Hydra's own sweeper: the last key changes fastest.

    Raises UserError for an interval, which has no list of values.
    """
    choices: dict[str, list[str]] = {}
    for override in asked:
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices[key] = [override.input_line or ""]
        elif override.is_discrete_sweep():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            if not choices[key]:
                raise UserError(f"{override.input_line} matches nothing")
        else:
            raise UserError(
                f"{override.input_line} has no list of values: Hydra's own sweeper takes a,b, choice(), range() and glob(); "
                f"intervals are for a sweeper that searches (hydra/sweeper=optuna, once its plugin is installed)"
            )
    return [list(point) for point in itertools.product(*choices.values())]


def one_point(asked: list[Override]) -> list[str]:
    """The first value of everything that has a list of values. Intervals are left out: their sweeper picks a value."""
    listed = [o for o in asked if not o.is_sweep_override() or o.is_discrete_sweep()]
    return [point[0] for point in (points_of([o])[0] for o in listed)]


def differing(points: list[list[str]]) -> list[str]:
    """What sets each point apart from the others, in a few words; with one point alone, nothing."""
    shared = set.intersection(*map(set, points)) if points else set()
    return [" ".join(override for override in point if override not in shared) for point in points]


# ---- what an earlier command left ----


def named(word: str, overrides: Iterable[str]) -> str | None:
    """The folder that the last `word=FOLDER` names (resume, sweep); None where there is none."""
    folders = [o.partition("=")[2] for o in overrides if o.startswith(f"{word}=") and o not in (f"{word}=", f"{word}=null")]
    return folders[-1] if folders else None


def saved_run(folder: str) -> Path:
    """The file with the overrides of the run in `folder`. Raises UserError where there is no run."""
    saved = Path(folder) / ".hydra" / "overrides.yaml"
    if not saved.is_file():
        raise UserError(f"resume={folder}: there is no run here (no {saved}); name a folder that train.py wrote, outputs/DATE/TIME")
    return saved


def resumed(saved: Path, overrides: list[str]) -> list[str]:
    """The run's own overrides, then the new ones, then the run's folder, in which it goes on.

    Raises UserError where the run's own cannot be read, or reach code that the new ones do not name again (`trusted`).
    """
    try:
        before = plain_yaml(saved)
    except (OSError, ValueError) as error:
        raise UserError(f"{saved} cannot be read ({first_line(error)}); it lists what the run was started with") from None
    run = saved.parents[1]
    before = [*_of_earlier_code(run), *trusted(before, overrides, saved, f"resume={run}")]
    return [*(o for o in before if not o.startswith("resume=")), *overrides, f"hydra.run.dir={quoted(str(run))}"]


def _of_earlier_code(run: Path) -> list[str]:
    """What a run needs whose configuration has no data.split_seed: a default that keeps the text that it holds out."""
    try:
        return [] if "split_seed" in plain_yaml(run / "config.yaml")["data"] else ["data.split_seed=null"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # what cannot be read is refused where the run is opened


def trusted(before: Any, typed: list[str], saved: Path, asked: str) -> list[str]:
    """The overrides `before`, which the file `saved` holds, less those that `typed` has in their place.

    The folder may come from somebody else. So what it holds may set values of ours and nothing more: an override that reaches
    other code counts only where the user types it (one with its key) himself. Raises UserError for one that he does not.
    """
    if not isinstance(before, list) or not all(isinstance(override, str) for override in before):
        raise UserError(f"{saved} is no list of KEY=VALUE; it lists what was asked for at the start")
    named = {parse_override(override).key_or_group for override in typed}
    reaching = [override for override in before if reaches_code(override)]
    unnamed = [override for override in reaching if parse_override(override).key_or_group not in named]
    if unnamed:
        raise UserError(
            f"{asked}: its overrides reach other code than this recipe's ({shlex.join(map(as_typed, unnamed))}); where you trust "
            f"them, type them again after {asked}"
        )
    return [override for override in before if override not in reaching]


def reaches_code(argument: str) -> bool:
    """Whether an override may do more than set a value of schema.Config or pick an option of conf/."""
    override = parse_override(argument)
    key = override.key_or_group
    if override.package is not None:
        return True
    if key in SAVED_HYDRA:
        return False
    if key in SAVED_GROUPS or key in GROUPS:  # an option is a file's name, and no path to one elsewhere
        return not re.fullmatch(r"[\w,\[\] ()-]*", argument.partition("=")[2])
    return key.partition(".")[0] not in KEYS or (key.startswith(REACHES_CODE) and argument not in REACHES_NONE)


def to_type_again(typed: Iterable[str]) -> list[str]:
    """Those of a run's own overrides that `resume` takes from the command line alone."""
    return [o for o in typed if reaches_code(for_hydra(o)) and not is_hydras(o.lstrip("+~").partition("=")[0])]


def swept(folder: str, overrides: list[str]) -> list[str]:
    """The overrides of the sweep in `folder`, which goes on there, with new values for its launcher.

    Raises UserError where there is no sweep, for a new value of anything else, and as `trusted` does.
    """
    saved = Path(folder) / "points.json"
    if not saved.is_file():
        raise UserError(f"sweep={folder}: there is no sweep here (no {saved}); name a folder that train.py -m wrote")
    new = [o for o in overrides if not o.startswith("sweep=")]
    before = read_json(saved).get("overrides")
    for override in new:
        if not override.startswith("hydra.launcher.") and override not in (before or []):
            raise UserError(
                f"{override}: sweep={folder} goes on with that sweep's own values, and only hydra.launcher.KEY=VALUE may be new; "
                f"start another sweep for other points"
            )
    before = trusted(before, new, saved, f"sweep={folder}")
    return [*before, *new, f"hydra.sweep.dir={quoted(folder)}", "hydra.launcher.go_on=true"]
