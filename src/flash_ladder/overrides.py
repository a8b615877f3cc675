"""The values on the command line: which keys hold text that is taken as it is, and which points a sweep over them has.

Hydra's grammar gives commas, quotes, brackets, numbers and ${ a meaning. A key that holds text, a path above all, is taken as typed
all the same: `for_hydra` writes it in that grammar, and `as_typed` undoes that.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from flash_ladder.errors import UserError, first_line
from flash_ladder.files import plain_yaml, read_json
from flash_ladder.schema import Config

ONE_TEXT = ("prompt", "resume", "sweep")  # which no sweep goes over: commas in them are text
FILES = ("data.files", "data.val_files")  # a text, or a list of them
SAVED_PATHS = (*FILES, "data.cache_dir")  # that a run reads again when it goes on or is exported, from whatever folder

# What a saved override may name beside the keys of schema.Config, and those of its keys that reach other code: classes of
# callbacks, arguments of Lightning, lines of a job's shell script.
SAVED_GROUPS = ("experiment", "hydra/launcher", "hydra/sweeper")
SAVED_HYDRA = ("hydra.sweep.dir", "hydra.sweep.subdir", *(f"hydra.launcher.{key}" for key in ("time_limit", "grace", "at_once")))
REACHES_CODE = ("callbacks.", "trainer.lightning", "slurm.")
REACHES_NONE = ("trainer.lightning={}", "slurm.submit=false")

KEYS = {field.name for field in fields(Config)}
GROUPS = KEYS - {"seed", "resume", "prompt"}

# ---- which keys hold text ----

TEXT, TEXT_OR_NULL, TEXTS, HYDRAS = "text", "text or null", "a list of texts", "a path of Hydra's, in which ${} is followed"
Texts = Mapping[str, str]  # the kind of every key that holds text


def text_keys(schema: type) -> Texts:
    """The keys of a command that hold text, by the types of its dataclass `schema`, and Hydra's own that are paths."""
    hydras = dict.fromkeys(("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"), HYDRAS)
    return hydras | {"sweep": TEXT_OR_NULL} | dict(_text_keys(schema, ""))


def _text_keys(schema: type, prefix: str) -> Iterable[tuple[str, str]]:
    kinds = {str: TEXT, str | None: TEXT_OR_NULL, list[str]: TEXTS, list[str] | None: TEXTS}
    for name, kind in get_type_hints(schema).items():
        key = f"{prefix}{name}"
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _text_keys(kind, f"{key}.")
        elif key in FILES or kind in kinds:
            yield key, TEXT_OR_NULL if key in FILES else kinds[kind]


OF_TRAIN = text_keys(Config)

# ---- text in Hydra's grammar ----


def is_hydras(key: str) -> bool:
    """Whether a key or group is Hydra's own: hydra.sweep.dir, hydra/launcher."""
    return re.split("[./]", key)[0] == "hydra"


def quoted(text: str, follow: bool = False) -> str:
    """Any text as a quoted value for Hydra, which gives spaces, quotes and commas a meaning; ${ as well, unless `follow`."""
    text = text if follow else _literal(text)
    text = re.sub(r"(\\*)('|\Z)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), text)
    return f"'{text}'"


def _literal(text: str) -> str:
    """Text that OmegaConf reads as `text`, where it has a ${ in it."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def run_folder(folder: Path) -> str:
    """The override that makes `folder` the run's."""
    if "${" not in str(folder.absolute()):
        return f"hydra.run.dir={quoted(str(folder))}"
    return f"hydra.run.dir={quoted(_literal(str(folder.absolute())))}"  # Hydra reads it twice


def written(text: str, follow: bool = False) -> str:
    """A text in Hydra's grammar: as it is where Hydra reads that very text, else quoted. follow: as in `quoted`."""
    is_plain = follow or "${" not in text
    return text if is_plain and _as_hydra_reads(text) == text else quoted(text, follow)


def _as_hydra_reads(text: str) -> Any:
    """The value that Hydra's grammar gives a text; None where it has none, or several."""
    try:
        [override] = OverridesParser.create().parse_overrides([f"x={text}"])
        return None if override.is_sweep_override() else override.value()
    except (HydraException, ValueError):
        return None


def plain(argument: str, texts: Texts) -> str:
    """++KEY=VALUE as KEY=VALUE: the two are the same for a key that is there, and ours are."""
    return argument[2:] if argument.startswith("++") and argument[2:].partition("=")[0] in texts else argument


def for_hydra(argument: str, texts: Texts = OF_TRAIN, is_sweep: bool = False) -> str:
    """KEY=VALUE as typed, in Hydra's grammar. Under a sweep a,b and the like stay several values."""
    name, equals, text = argument.partition("=")
    kind = texts.get(name.lstrip("+"))
    if kind is None or not equals:
        return argument
    if kind != TEXT and text in ("", "null"):
        return argument
    if kind == HYDRAS and text[0] in "'\"" and isinstance(_as_hydra_reads(text), str):  # quoted for Hydra by the user
        return argument
    if is_sweep and name not in ONE_TEXT and kind != HYDRAS:
        if re.fullmatch(r"[^'\"()\[\]{}\\$]*,[^'\"()\[\]{}\\$]*", text):
            return f"{name}={','.join(map(written, text.split(',')))}"
        if _is_several(argument):
            return argument
    if (kind == TEXTS or name in FILES) and text.startswith("[") and text.endswith("]"):
        several = re.fullmatch(r"\[[^'\"()\[\]{}\\$]+\]", text)
        return f"{name}=[{','.join(written(one.strip()) for one in text[1:-1].split(','))}]" if several else argument
    return argument if kind == TEXTS else f"{name}={written(text, follow=kind == HYDRAS)}"


def _is_several(argument: str) -> bool:
    try:
        [override] = OverridesParser.create().parse_overrides([argument])
        return override.is_sweep_override()
    except (HydraException, ValueError):
        return False


def as_typed(override: str, texts: Texts = OF_TRAIN) -> str:
    """What a user types for an override in Hydra's grammar; `for_hydra` undone."""
    name, _, text = override.partition("=")
    if texts.get(name.lstrip("+")) not in (TEXT, TEXT_OR_NULL) or text[:1] not in ("'", '"'):
        return override
    value = str(parse_override(override).value())  # in which Hydra leaves the backslashes before ${ to OmegaConf
    return f"{name}=" + re.sub(r"(\\*)\\\$\{", lambda start: start[1][: len(start[1]) // 2] + "${", value)


def absolute(argument: str) -> str:
    """Makes relative paths that a run will read again absolute; `argument` as in `for_hydra`, one run's."""
    name, _, text = argument.partition("=")
    if name not in SAVED_PATHS or text in ("", "null"):
        return argument
    if not (name in FILES and text.startswith("[") and text.endswith("]")):
        return f"{name}={_absolute(text)}"
    found = _as_hydra_reads(text)
    if not isinstance(found, list) or not all(isinstance(path, str) for path in found):
        return argument
    return f"{name}=[{','.join(quoted(_absolute(path)) for path in found)}]"


def _absolute(path: str) -> str:
    return path if path.startswith("~") else os.path.join(os.getcwd(), path)


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
        is_missing = not override.is_sweep_override() and override.value() == "???"
    except HydraException:
        raise UserError(f"{argument} cannot be read: {_what_can(key, value)}") from None
    except ValueError:  # Python reads no number of thousands of digits
        raise UserError(f"{argument} cannot be read: a number has at most 64 bits here, about 19 digits") from None
    if is_missing:
        raise UserError(f"{argument} says that the value is missing; give one")
    return override


def _what_can(key: str, value: str) -> str:
    """What to type for a value that Hydra cannot read."""
    if not re.fullmatch(r"[+~]{0,2}[\w./@:-]+", key):
        return "there is no such key; --help lists them"
    if value.startswith("["):
        return f"a text with such characters needs quotes of its own in a list, \"{key}=['a, b','c']\""
    return f"such a value needs quotes that the shell leaves on, {shlex.quote(f'{key}={quoted(value)}')}"


# ---- the points of a sweep ----


def asks_for_a_sweep(flags: Iterable[str], overrides: Iterable[str]) -> bool:
    """Whether Hydra would run several points: -m, or the mode by its name."""
    return "--multirun" in flags or "hydra.mode=MULTIRUN" in overrides


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
    """The folder that the last `word=FOLDER` names (resume, sweep); None where there is none.

    Raises UserError for an empty name.
    """
    folders = [o.partition("=")[2] for o in overrides if o.startswith(f"{word}=") and o != f"{word}=null"]
    if folders and not folders[-1]:
        raise UserError(f"{word} is empty; name the folder that goes on, or leave it out")
    return folders[-1] if folders else None


def saved_run(folder: str) -> Path:
    """The file with the overrides of the run in `folder`. Raises UserError where there is no run."""
    saved = Path(folder) / ".hydra" / "overrides.yaml"
    if not os.path.isfile(saved):
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
    if not os.path.isfile(saved):
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
