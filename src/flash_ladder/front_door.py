"""The front door: how train.py and every script start. Hydra composes YAML and the command line on top of the schema's defaults,
this file checks the result, and only then `main` imports torch.

A mistake costs a user under a second and leaves no files behind. One line says what is wrong, why, and what would work.
The dataclasses that a configuration is checked against are in flash_ladder.schema.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from flash_ladder import names
from flash_ladder.errors import UserError, nearest, one_of
from flash_ladder.files import make_writable
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
    close = nearest(key, known) or nearest(key.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in known])
    return UserError(f"{key} is not a key{close}; --help lists them")


def _check(conf: Path, config_name: str, overrides: list[str], schema: type, sweep: bool) -> DictConfig:
    """Composes what the command line asks for and checks it; returns the configuration with Hydra's own part.

    A sweep (`seed=1,2`) is checked here at its first point, and at every other point when that starts.
    Raises UserError for an unknown key or group option (naming the nearest right one), a wrong type or an impossible combination.
    """
    asked = [_parse_override(argument) for argument in overrides]
    for override in asked if not sweep else ():
        if override.is_sweep_override():
            raise UserError(f"{override.input_line} names several values: add -m to run each, or write a list as [a,b]")
    with initialize_config_dir(str(conf), version_base="1.3"):
        defaults = compose(config_name, return_hydra_config=True)
        for override in asked:
            key, value = override.key_or_group, override.value()
            if (conf / key).is_dir():
                options = sorted(path.stem for path in (conf / key).glob("*.yaml"))
                for option in str(value).split(",") if not override.is_sweep_override() else override.sweep_string_iterator():
                    one_of(key, option, options)
            elif not override.is_add() and not _has(defaults, key):
                raise _unknown_key(key, _without_hydra(defaults))
        first_point = [
            f"{o.key_or_group}={next(o.sweep_string_iterator())}" if o.is_sweep_override() else argument
            for argument, o in zip(overrides, asked, strict=True)
        ]
        try:
            cfg = compose(config_name, first_point, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(str(error).splitlines()[0]) from None
    parse(_without_hydra(cfg), schema)
    return cfg


def _parse_override(argument: str) -> Override:
    """One argument of the command line as Hydra reads it. Raises UserError where Hydra cannot, saying what to type instead."""
    key, equals, value = argument.partition("=")
    if not equals and not argument.startswith("~"):
        raise UserError(f"{argument} is not KEY=VALUE; --help lists the keys")
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        quoted = f"'{key}=\"{value}\"'"
        raise UserError(f"{argument} cannot be read: such a value needs quotes that the shell leaves on, {quoted}") from None
    if override.value() == "???":
        raise UserError(f"{argument} says that the value is missing; give one")
    return override


def _has(cfg: DictConfig, key: str) -> bool:
    """Whether a dotted key is in `cfg`, set to None or missing included."""
    node: Any = cfg
    for part in key.split("."):
        if not OmegaConf.is_dict(node) or part not in node:
            return False
        node = None if OmegaConf.is_missing(node, part) else node[part]
    return True


def _without_hydra(cfg: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def _run_to_resume(overrides: list[str]) -> Path | None:
    """The file with the overrides of the run that `resume=RUN` names; None where nothing is resumed."""
    runs = [o.partition("=")[2] for o in overrides if o.startswith("resume=") and o not in ("resume=", "resume=null")]
    if not runs:
        return None
    saved = Path(runs[-1]) / ".hydra" / "overrides.yaml"
    if not saved.is_file():
        raise UserError(
            f"resume={runs[-1]}: there is no run here (no {saved}); name a folder that train.py wrote, outputs/DATE/TIME"
        )
    return saved


def _resumed(saved: Path, overrides: list[str]) -> list[str]:
    """The run's own overrides, then the new ones, then the run's folder, in which it goes on."""
    before: Any = OmegaConf.to_container(OmegaConf.load(saved))
    return [*(o for o in before if not o.startswith("resume=")), *overrides, f"hydra.run.dir={_quoted(str(saved.parents[1]))}"]


def _quoted(text: str) -> str:
    """Any text as a quoted value for Hydra, which gives spaces, quotes, commas and ${ a meaning."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no interpolation
    text = re.sub(r"(\\*)('|\Z)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), text)
    return f"'{text}'"


def _verbatim(argument: str) -> str:
    """Quotes the value of `prompt=...`, which is any text."""
    key, equals, text = argument.partition("=")
    return f"prompt={_quoted(text)}" if key == "prompt" and equals else argument


def front_door(config_name: str, schema: type[T], main: Callable[[T, Path], int | None], conf: Path = CONF) -> None:
    """Starts a command: composes the defaults of `schema`, `conf`/`config_name`.yaml and the command line, checks the result, and
    calls `main(cfg, output_dir)`.

    `output_dir` is Hydra's run folder (the working folder for commands that write none). The process exits with what `main`
    returns, with 2 and one line on a UserError, and with 130 on Ctrl-C.
    """
    _leave_script_folder()
    store_defaults(schema)
    processes = None
    try:
        processes = started()
    except UserError as error:
        _fail(error)
    mine = processes is not None and processes.by == "train.py"  # started by the first process, with arguments that it has checked
    arguments = sys.argv[1:] if mine else [_verbatim(argument) for argument in sys.argv[1:]]
    flags = [a for a in arguments if a.startswith("-")]
    overrides = [a for a in arguments if a not in flags]
    saved, saved_text = None, ""
    sys.argv[1:] = arguments
    try:
        # Hydra's own flags (--help, --cfg) need no check.
        if set(flags) <= {"-m", "--multirun"}:
            saved = _run_to_resume(overrides)
            if saved is not None:
                overrides, saved_text = _resumed(saved, overrides), saved.read_text()
            cfg = _check(conf, config_name, overrides, schema, sweep=bool(flags))
            if not is_first(processes):  # the run's folder is the first process's, which alone writes to it
                named = any(override.startswith("hydra.run.dir=") for override in overrides)
                overrides += ["hydra.output_subdir=null", *([] if named else ["hydra.run.dir=."])]
            elif cfg.hydra.output_subdir is not None:  # the scripts have no run folder
                make_writable(Path(cfg.hydra.run.dir), "the output folder", "hydra.run.dir")
                if not flags:  # Hydra would read the clock again, and might make another folder a second later
                    overrides.append(f"hydra.run.dir={_quoted(cfg.hydra.run.dir)}")
            sys.argv[1:] = [*flags, *overrides]
    except UserError as error:
        _fail(error)

    @hydra.main(version_base="1.3", config_path=str(conf), config_name=config_name)
    def run(cfg: DictConfig) -> None:
        # The first heavy import. Without a GPU it must come before Lightning, which loads Triton.
        import flash_ladder.kernels  # noqa: F401

        try:
            code = main(parse(cfg, schema), Path(HydraConfig.get().runtime.output_dir))
        except UserError as error:
            if saved is not None and is_first(processes):
                # Hydra has written the new overrides into a run that could not go on: undo that.
                saved.write_text(saved_text)
            elif HydraConfig.get().output_subdir is not None:
                _remove_bare(Path(HydraConfig.get().runtime.output_dir))
            _fail(error)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)
        if code:
            sys.exit(code)

    run()


def _leave_script_folder() -> None:
    """Removes the running script's folder from sys.path, where Python has put it first."""
    # train.py lies beside the folder kernels/, and scripts/ holds evaluate.py. A library that imports Hugging Face's `kernels` or
    # `evaluate` would find ours instead. Our own imports are installed.
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is not None:
        folder = Path(script).resolve().parent
        sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != folder]


def _remove_bare(folder: Path) -> None:
    """Removes the folder of a run that never began: one that holds nothing but Hydra's notes."""
    if {path.name for path in folder.iterdir()} == {".hydra"}:
        shutil.rmtree(folder)


def _fail(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
