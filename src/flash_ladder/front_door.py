"""The front door: how train.py and every script start. Hydra composes YAML and the command line on top of the schema's defaults,
this file checks the result, and only then `main` imports torch.

A mistake costs a user about a second and leaves no files behind. One line says what is wrong, why, and what would work.
The dataclasses that a configuration is checked against are in flash_ladder.schema; flash_ladder.overrides reads the command line.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import CompactHydraException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from tqdm import tqdm

from flash_ladder import names, stopping
from flash_ladder import overrides as command_line
from flash_ladder.errors import UserError, nearest, one_of
from flash_ladder.files import make_writable, refuse_taken
from flash_ladder.processes import is_first, started

CONF = Path(__file__).resolve().parents[2] / "conf"

# Placeholders that a help text in YAML may hold: the list of backends, and the list of the benchmark's peers.
OmegaConf.register_new_resolver("backends", lambda: names.listing(names.BACKENDS), replace=True)
OmegaConf.register_new_resolver("peers", lambda: names.listing(names.PEERS), replace=True)

# ---- from a composed DictConfig to a checked dataclass ----

T = TypeVar("T")


def parse(cfg: DictConfig, schema: type[T]) -> T:
    """Merges a composed configuration onto the dataclass `schema` and validates it.

    Raises UserError for an unknown key, a wrong type or an impossible combination.
    """
    try:
        parsed: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg))
    except ConfigKeyError as error:
        raise _unknown_key(str(error.full_key), OmegaConf.structured(schema)) from None
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{error.full_key}: {reason[0].lower()}{reason[1:]}") from None
    parsed.validate()
    return parsed


def store_defaults(schema: type) -> None:
    """Stores the defaults of the dataclass `schema` where a YAML file's defaults list finds them, under the name "schema".

    They are stored as plain values, without types: `parse` words a user's mistakes, and Hydra would report a wrong type first.
    """
    ConfigStore.instance().store("schema", OmegaConf.to_container(OmegaConf.structured(schema)))


def without_hydra(cfg: DictConfig) -> DictConfig:
    """The command's own part of a composed configuration."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def _leaves(tree: dict, prefix: str = "") -> list[str]:
    """Every key of a nested dict in dotted form."""
    keys = []
    for key, value in tree.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _leaves(value, f"{prefix}{key}.")
    return keys


def _unknown_key(key: str, cfg: DictConfig) -> UserError:
    tree: Any = OmegaConf.to_container(cfg, resolve=False)
    known = _leaves(tree)
    parent, _, leaf = key.rpartition(".")
    if parent in known and OmegaConf.select(cfg, parent) == {}:  # whose keys are another library's
        return UserError(f"{key} is not set yet; +{key}=VALUE adds it")
    close = nearest(key, known) or nearest(leaf, [k.rsplit(".", 1)[-1] for k in known])
    return UserError(f"{key} is not a key{close}; --help lists them")


# ---- checks before Hydra starts ----


def _check(conf: Path, config_name: str, overrides: list[str], schema: type, sweep: bool) -> DictConfig:
    """Composes what the command line asks for and checks it, every point of a sweep; returns the (first) configuration with
    Hydra's own part.

    Whatever begins with `hydra` is Hydra's to judge. The points of a sweeper that searches are checked when its launcher gets them.
    Raises UserError for an unknown key or group option (naming the nearest right one), a wrong type or an impossible combination.
    """
    with initialize_config_dir(str(conf), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        asked = [command_line.parse_override(argument, loader) for argument in overrides]
        for override in asked if not sweep else ():
            if override.is_sweep_override():
                raise UserError(f"{override.input_line} names several values: add -m to run each, or write a list as [a,b]")
        if not any(override.key_or_group == "hydra.searchpath" for override in asked):  # which brings groups and options of its own
            defaults = compose(config_name, return_hydra_config=True)
            for override in asked:
                _check_key(conf, defaults, override)
        cfg = _compose(config_name, command_line.one_point(asked))
        if sweep and cfg.hydra.runtime.choices["hydra/sweeper"] == "basic":
            listed = [
                command_line.parse_override(f"{key}={value}", loader) for key, value in (cfg.hydra.sweeper.params or {}).items()
            ]
            _check_points(config_name, command_line.points_of([*listed, *asked]), schema)
        else:
            fixed = [override.input_line or "" for override in asked if not override.is_sweep_override()]
            _check_either(config_name, cfg, fixed, schema)
    return cfg


def _check_key(conf: Path, defaults: DictConfig, override: Override) -> None:
    """Raises UserError where the key, or the option of a group, is not there."""
    key = override.key_or_group
    if command_line.is_hydras(key):
        return
    if (conf / key).is_dir():
        options = sorted(path.stem for path in (conf / key).glob("*.yaml"))
        value = list(override.sweep_string_iterator()) if override.is_sweep_override() else override.value()
        for option in value if isinstance(value, list) else [value]:
            one_of(key, str(option), options)
    elif not override.is_add() and not _has(defaults, key):
        raise _unknown_key(key, without_hydra(defaults))


def _has(cfg: DictConfig, key: str) -> bool:
    """Whether a dotted key is in `cfg`, set to None, missing, or a reference that cannot be followed yet included."""
    *parents, leaf = key.split(".")
    node: Any = cfg
    for part in parents:
        node = node.get(part) if OmegaConf.is_dict(node) else None
    return OmegaConf.is_dict(node) and leaf in node.keys()  # noqa: SIM118  # `in node` would follow the reference


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    try:
        return compose(config_name, overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        said = str(error).partition("Config search path")[0].split()  # and for an option that is not there, those that are
        cause = str(error.__cause__).splitlines()[:1] if error.__cause__ else []
        raise UserError(": ".join([" ".join(said), *cause])) from None


def _check_points(config_name: str, points: list[list[str]], schema: type) -> None:
    """Raises one UserError that lists every point that cannot run, a line each."""
    wrong: list[tuple[str, str]] = []
    bar = tqdm(points, desc="checking", unit="point", leave=False, delay=2)
    for point, apart in zip(bar, command_line.differing(points), strict=True):
        try:
            parse(without_hydra(_compose(config_name, point)), schema)
        except UserError as error:
            wrong.append((apart, str(error)))
    if len(wrong) == len(points) and len({reason for _, reason in wrong}) == 1:
        raise UserError(wrong[0][1])
    if len(wrong) == 1:
        raise UserError(f"{wrong[0][0]}: {wrong[0][1]} (1 of {len(points)} points; none was started)")
    if wrong:
        lines = "".join(f"\n  {apart}: {reason}" for apart, reason in wrong)
        raise UserError(f"{len(wrong)} of {len(points)} points cannot run, and none was started:{lines}")


def _check_either(config_name: str, first: DictConfig, fixed: list[str], schema: type) -> None:
    """Checks a run, or the first point of a search. That point may be a bad combination which the search has others beside: then
    what all points share decides.
    """
    try:
        parse(without_hydra(first), schema)
    except UserError as error:
        try:
            parse(without_hydra(_compose(config_name, fixed)), schema)
        except UserError:
            raise error from None


# ---- the folder that a command writes to ----


def _claim(folder: Path, key: str, is_chosen: bool, is_new: bool) -> Path:
    """Makes the folder of a run or a sweep and returns it: another name beside it, where the clock's name is taken.

    is_chosen: the user named it. is_new: nothing may be in it yet. Raises UserError where that is not so, or it cannot be written.
    """
    if is_chosen and is_new and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{key}={folder} is not empty; name another folder (a sweep goes on with sweep={folder})")
    if is_chosen:
        make_writable(folder, "the output folder", key)
        return folder
    make_writable(folder.parent, "the output folder", key)
    for number in itertools.count(1):
        free = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            free.mkdir()
            return free
        except FileExistsError:  # another command began in the same second
            continue
    raise AssertionError("count() has no end")


def _remove_bare(folder: Path) -> None:
    """Removes the folder of a run that never began: one that holds nothing but Hydra's notes."""
    if {path.name for path in folder.iterdir()} == {".hydra"}:
        shutil.rmtree(folder)


# ---- the door ----


class PointFailed(CompactHydraException):
    """A point of a sweep that another launcher than ours runs in this process: Hydra runs the others and then exits with 1."""


def front_door(config_name: str, schema: type[T], main: Callable[[T, Path], float | None], conf: Path = CONF) -> None:
    """Starts a command: composes the defaults of `schema`, `conf`/`config_name`.yaml and the command line, checks the result, and
    calls `main(cfg, output_dir)`.

    `output_dir` is Hydra's run folder (the working folder for commands that write none). An int that `main` returns is the exit
    code; a float is the result, for Hydra's sweepers. The process exits with 2 and one line on a UserError, and with 130 on Ctrl-C.
    """
    _leave_script_folder()
    store_defaults(schema)
    try:
        asked = _read(sys.argv[1:], conf, config_name, schema)
    except UserError as error:
        fail(error)
    sys.argv[1:] = [*asked.flags, *asked.overrides]
    saved_text = asked.resumes.read_text() if asked.resumes else ""

    @hydra.main(version_base="1.3", config_path=str(conf), config_name=config_name)
    def run(cfg: DictConfig) -> float | None:
        # The first heavy import. Without a GPU it must come before Lightning, which loads Triton.
        import flash_ladder.kernels  # noqa: F401

        sys.argv[1:] = [*asked.flags, *map(command_line.as_typed, asked.overrides)]  # training.ranks starts processes with these
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            result = main(parse(cfg, schema), folder)
        except UserError as error:
            if asked.resumes and is_first(started()):
                # Hydra has written the new overrides into a run that could not go on: undo that
                asked.resumes.write_text(saved_text)
            elif HydraConfig.get().output_subdir is not None:
                _remove_bare(folder)
            if asked.is_sweep:
                print(f"error: {error}", file=sys.stderr)
                raise PointFailed(str(error)) from None
            fail(error)
        if isinstance(result, int) and result:
            if asked.is_sweep:
                raise PointFailed(f"exit code {result}")
            sys.exit(result)
        return result

    try:
        with stopping.raises_ended():
            run()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


@dataclass(frozen=True)
class Asked:
    """What a command was asked for, in Hydra's grammar, checked, with the folder that it writes to."""

    flags: list[str]
    overrides: list[str]
    is_sweep: bool
    resumes: Path | None = None  # the file with the overrides of the run that goes on


def _read(typed: list[str], conf: Path, config_name: str, schema: type) -> Asked:
    """Reads and checks the arguments of a command, and makes its folder. Raises UserError."""
    flags, overrides = command_line.split(typed)
    go_on, resume = command_line.named("sweep", overrides), command_line.named("resume", overrides)
    overrides = [command_line.for_hydra(override) for override in overrides]
    if not command_line.HELP.isdisjoint(flags):  # Hydra's help shows one run
        overrides = [override for override in overrides if not command_line.parse_override(override).is_sweep_override()]
        return Asked([flag for flag in flags if flag not in command_line.SWEEP], overrides, is_sweep=False)
    if go_on and command_line.SWEEP.isdisjoint(flags):
        flags = [*flags, "-m"]
    sweep = command_line.asks_for_a_sweep(flags, overrides)
    _check_flags(flags, sweep, resume)
    if not set(flags) <= command_line.SWEEP:  # Hydra's own flags, --cfg or --config-dir, need no check
        return Asked(flags, overrides, sweep)
    saved = None
    if go_on:
        overrides = command_line.swept(go_on, overrides)
    elif resume:
        saved = command_line.saved_run(resume)
        overrides = command_line.resumed(saved, overrides)
    if sweep:
        overrides = [command_line.for_sweeper(override) for override in overrides]
    cfg = _check(conf, config_name, overrides, schema, sweep)
    if not is_first(started()):  # the run's folder is the first process's, which alone writes to it
        named = any(override.startswith("hydra.run.dir=") for override in overrides)
        overrides = [*overrides, "hydra.output_subdir=null", *([] if named else ["hydra.run.dir=."])]
    elif cfg.hydra.output_subdir is not None:  # the scripts have no run folder
        key, folder = ("hydra.sweep.dir", cfg.hydra.sweep.dir) if sweep else ("hydra.run.dir", cfg.hydra.run.dir)
        is_chosen = any(override.startswith(f"{key}=") for override in overrides)
        if not sweep and not saved:
            refuse_taken(Path(folder))  # before Hydra writes its notes there
        claimed = _claim(Path(folder), key, is_chosen, is_new=sweep and not go_on)
        # Hydra would read the clock again, and might make another folder a second later.
        overrides = [*overrides, f"{key}={command_line.quoted(str(claimed))}"]
    return Asked(flags, overrides, sweep, saved)


def _check_flags(flags: list[str], sweep: bool, resume: str | None) -> None:
    """Raises UserError for a sweep beside what is about one run."""
    if not sweep:
        return
    if other := command_line.ONE_RUN.intersection(flags):
        raise UserError(f"{other.pop()} is about one run: leave -m out")
    if resume:
        raise UserError(f"resume={resume} goes on with one run, so leave -m out; a sweep goes on with sweep=FOLDER")
    if started() is not None:
        raise UserError("a sweep starts the processes of every point itself: start it once, without torchrun or the like")


def _leave_script_folder() -> None:
    """Removes the running script's folder from sys.path, where Python has put it first."""
    # train.py lies beside the folder kernels/, and scripts/ holds evaluate.py. A library that imports Hugging Face's `kernels` or
    # `evaluate` would find ours instead. Our own imports are installed.
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is not None:
        folder = Path(script).resolve().parent
        sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != folder]


def fail(error: UserError) -> NoReturn:
    """Ends the command with the one line and exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
