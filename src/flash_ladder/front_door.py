"""The front door: how train.py and every script start. Hydra composes YAML and the command line on top of the schema's defaults,
flash_ladder.composition checks the result, and only then `main` imports torch.

A mistake costs a user about a second and leaves no files behind. One line says what is wrong, why, and what would work.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from flash_ladder import flags as hydras_flags
from flash_ladder import overrides as command_line
from flash_ladder import stopping
from flash_ladder.composition import Source, check, followed, parse, store_defaults
from flash_ladder.errors import UserError, argument
from flash_ladder.files import LOCK, as_yaml, make_writable, owned, refuse_taken
from flash_ladder.flags import Flags
from flash_ladder.processes import is_first, started
from flash_ladder.screen import outlive_readers

CONF = Path(__file__).resolve().parents[2] / "conf"
NOTES = ".hydra"  # in the folder of a run, as Hydra calls it

T = TypeVar("T")

# ---- the folder that a command writes to ----


def _folder(cfg: DictConfig, key: str) -> Path:
    """The folder that `key` names. Raises UserError where it is empty, or refers to what is not there."""
    folder = followed(cfg, key)
    if not folder:
        raise UserError(f"{key} is empty; name a folder, or leave it out")
    return Path(str(folder))


def _claim(folder: Path, key: str, is_chosen: bool, is_new: bool) -> Path:
    """Makes the folder of a run or a sweep and returns it: another name beside it, where the clock's name is taken.

    is_chosen: the user named it. is_new: nothing may be in it yet. Raises UserError where that is not so, or it cannot be written.
    """
    if is_chosen and is_new and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{key}={folder} is not empty; name another folder (a sweep goes on with {argument('sweep', folder)})")
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


def _first_missing(folder: Path) -> Path | None:
    """The uppermost of `folder` and those above it that is not there."""
    missing = [path for path in (folder.absolute(), *folder.absolute().parents) if not os.path.exists(path)]
    return missing[-1] if missing else None


def _remove_bare(folder: Path, made: Path | None) -> None:
    """Removes what a run that never began leaves: a lock, Hydra's notes, and the folders from `made` down, made for it."""
    if not {path.name for path in folder.iterdir()} <= {NOTES, LOCK}:
        return
    shutil.rmtree(folder / NOTES, ignore_errors=True)
    (folder / LOCK).unlink(missing_ok=True)
    folder = folder.absolute()
    with contextlib.suppress(OSError):  # another run has begun beside it
        while made is not None and folder.is_relative_to(made):
            folder.rmdir()
            folder = folder.parent


def hydra_notes(cfg: Any) -> dict[str, str]:
    """Texts by file name, in the folder of the run that Hydra is at, of what Hydra says about it. resume= reads them.

    Hydra itself would write them before `main` knows whether the run can start, over those of the run that it goes on with.
    """
    about: Any = HydraConfig.instance().cfg
    return {
        f"{NOTES}/config.yaml": as_yaml(asdict(cfg)),
        f"{NOTES}/hydra.yaml": OmegaConf.to_yaml(about),
        f"{NOTES}/overrides.yaml": OmegaConf.to_yaml(about.hydra.overrides.task),
    }


# ---- the door ----


class PointFailed(CompactHydraException):
    """A point of a sweep that another launcher than ours runs in this process: Hydra runs the others and then exits with 1."""


def front_door(config_name: str, schema: type[T], main: Callable[[T, Path], float | None], conf: Path = CONF) -> None:
    """Starts a command: composes the defaults of `schema`, `conf`/`config_name`.yaml and the command line, checks the result, and
    calls `main(cfg, output_dir)`.

    `output_dir` is Hydra's run folder (the working folder for commands that write none). An int that `main` returns is the exit
    code; a float is the result, for Hydra's sweepers. The process exits with 2 and one line on a UserError, and with 130 on Ctrl-C.
    """
    printed = outlive_readers()
    _leave_script_folder()
    store_defaults(schema)
    try:
        asked = _read(sys.argv[1:], conf, config_name, schema)
    except (UserError, OSError) as error:
        fail(in_a_line(error))
    if "--version" in asked.flags:
        print(f"Flash Ladder {version('flash-ladder')}")
        return
    flags, texts = hydras_flags.typed(asked.flags), command_line.text_keys(schema)
    writes_notes = asked.has_folder and not asked.is_sweep  # `hydra_notes`, in place of Hydra
    sys.argv[1:] = [*flags, *asked.overrides, *(["hydra.output_subdir=null"] if writes_notes else [])]

    @hydra.main(version_base="1.3", config_path=str(conf), config_name=config_name)
    def run(cfg: DictConfig) -> float | None:
        # training.ranks starts processes with these
        sys.argv[1:] = [*flags, *(command_line.as_typed(override, texts) for override in asked.overrides)]
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            with owned(folder) if asked.has_folder else contextlib.nullcontext():
                result = _call(lambda: main(parse(cfg, schema), folder), folder, asked)
        except UserError as error:
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
    if sys.stdout is not None:
        sys.stdout.flush()
    lost = [file.error for file in printed if file.error is not None and file.error.errno != errno.EPIPE]
    if lost and not asked.has_folder:  # what a run prints is in its train.log as well
        fail(UserError(f"what this command prints could not be written ({lost[0].strerror})"))


def _call(main: Callable[[], float | None], folder: Path, asked: Asked) -> float | None:
    """Calls a command's `main`, and removes its folder where it ends before it has written anything there."""
    # The first heavy import. Without a GPU it must come before Lightning, which loads Triton.
    import flash_ladder.kernels  # noqa: F401

    try:
        return main()
    except BaseException as error:
        if asked.has_folder and not asked.resumes:
            _remove_bare(folder, asked.made)
        if isinstance(error, (UserError, OSError)):
            raise in_a_line(error) from error
        raise


NAMED_WRONGLY = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def in_a_line(error: UserError | OSError) -> UserError:
    """`error`, with a path that the system refuses as a line for the user. Raises any other error of the system again."""
    if isinstance(error, UserError):
        return error
    if error.errno not in NAMED_WRONGLY or error.filename is None:
        raise error
    return UserError(f"{os.fsdecode(error.filename)}: {(error.strerror or '').lower()}; name another path")


@dataclass(frozen=True)
class Asked:
    """What a command was asked for, in Hydra's grammar, checked, with the folder that it writes to."""

    flags: Flags
    overrides: list[str]
    is_sweep: bool = False
    has_folder: bool = False  # of its own: not so for a script, and for the further processes of a run
    resumes: bool = False  # a run that is there already
    made: Path | None = None  # the uppermost folder that was made for it


def _read(typed: list[str], conf: Path, config_name: str, schema: type) -> Asked:
    """Reads and checks the arguments of a command, and makes its folder. Raises UserError."""
    for word in typed:
        if word != word.encode(errors="replace").decode():
            raise UserError(f"{word.partition('=')[0]}: its bytes are not UTF-8, and only text can be given here")
    flags, overrides = hydras_flags.split(typed)
    for flag in ("--config-dir", "--config-path"):
        if flag in flags:  # which Hydra would take from this file's folder
            flags[flag] = os.path.abspath(flags[flag])
    texts = command_line.text_keys(schema)
    overrides = [command_line.plain(override, texts) for override in overrides]
    hydras_flags.check(flags, overrides)
    if "--version" in flags or "--shell-completion" in flags:
        return Asked(flags, overrides)
    source = Source.of(conf, config_name, flags)
    go_on, resume = command_line.named("sweep", overrides), command_line.named("resume", overrides)
    if any(flag in flags for flag in hydras_flags.SHOW):  # of one run
        overrides = [command_line.for_hydra(o, texts) for o in overrides if not o.startswith("sweep=")]
        overrides = [o for o in overrides if not command_line.parse_override(o).is_sweep_override()]
        check(source, overrides, schema, sweep=False, shows=True)
        flags.pop("--multirun", None)
        return Asked(flags, overrides)
    if go_on:
        flags["--multirun"] = ""
    sweep = command_line.asks_for_a_sweep(flags, overrides)
    _check_sweep(sweep, resume)
    overrides = [command_line.for_hydra(o if sweep else command_line.absolute(o), texts, sweep) for o in overrides]
    if go_on:
        overrides = command_line.swept(go_on, overrides)
    elif resume:
        overrides = command_line.resumed(command_line.saved_run(resume), overrides)
    if sweep:
        overrides = [command_line.for_sweeper(override) for override in overrides]
    cfg = check(source, overrides, schema, sweep)
    has_folder = is_first(started()) and cfg.hydra.output_subdir is not None  # the scripts' conf says null
    made = None
    if not is_first(started()):  # the run's folder is the first process's, which alone writes to it
        named = any(override.startswith("hydra.run.dir=") for override in overrides)
        overrides = [*overrides, "hydra.output_subdir=null", *([] if named else ["hydra.run.dir=."])]
    elif has_folder:
        key = "hydra.sweep.dir" if sweep else "hydra.run.dir"
        folder, is_chosen = _folder(cfg, key), any(override.startswith(f"{key}=") for override in overrides)
        if not sweep and not resume:
            refuse_taken(folder)
        made = _first_missing(folder)
        claimed = _claim(folder, key, is_chosen, is_new=sweep and not go_on)
        # Hydra would read the clock again, and might make another folder a second later.
        overrides = [*overrides, f"{key}={command_line.quoted(str(claimed))}" if sweep else command_line.run_folder(claimed)]
    elif not sweep and any(override.startswith("hydra.run.dir=") for override in overrides):
        raise UserError("hydra.run.dir is for train.py: this command has no folder of its own; out=PATH says where a result goes")
    return Asked(flags, overrides, sweep, has_folder, bool(resume), made)


def _check_sweep(sweep: bool, resume: str | None) -> None:
    """Raises UserError for a sweep beside what is about one run."""
    if sweep and resume:
        raise UserError(f"resume={resume} goes on with one run, so leave -m out; a sweep goes on with sweep=FOLDER")
    if sweep and started() is not None:
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
