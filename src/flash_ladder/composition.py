"""From YAML files and the command line to a checked configuration: Hydra composes, and what is wrong becomes a line.

The dataclasses that a configuration is checked against are in flash_ladder.schema; flash_ladder.overrides reads the command line.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, ConfigTypeError, OmegaConfBaseException
from tqdm import tqdm

from flash_ladder import names
from flash_ladder import overrides as command_line
from flash_ladder.errors import UserError, check_values, near, one_of
from flash_ladder.flags import Flags
from flash_ladder.schema import NOT_HERE

# Placeholders that a help text in YAML may hold: the list of backends, and the list of the benchmark's peers.
OmegaConf.register_new_resolver("backends", lambda: names.listing(names.BACKENDS), replace=True)
# ${only_for:KEY,VALUE,THEN}: THEN where KEY has that value, else null.
OmegaConf.register_new_resolver("only_for", lambda found, value, then: then if found == value else None, replace=True)
OmegaConf.register_new_resolver("peers", lambda: names.listing(names.PEERS), replace=True)

# ---- from a composed DictConfig to a checked dataclass ----

T = TypeVar("T")


def parse(cfg: DictConfig, schema: type[T]) -> T:
    """Merges a composed configuration onto the dataclass `schema` and validates it.

    Raises UserError for an unknown key, a wrong type or an impossible combination.
    """
    try:
        merged = _merge(schema, cfg)
        OmegaConf.to_object(merged)  # names the key of a ${...} that cannot be followed
        _check_references(schema, merged)
        parsed: Any = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise _unknown_key(str(error.full_key), OmegaConf.structured(schema)) from None
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{error.full_key}: {reason[0].lower()}{reason[1:]}") from None
    check_values(parsed)
    parsed.validate()
    return parsed


def _merge(schema: type, cfg: Any) -> Any:
    """`cfg` on the dataclass `schema`. Raises OmegaConf's errors, and UserError for a list in place of names, or the reverse."""
    structured = OmegaConf.structured(schema)
    try:
        return OmegaConf.merge(structured, cfg)
    except ConfigTypeError:
        plain: list[Any] = [OmegaConf.to_container(c, resolve=False) for c in (cfg, structured)]
        given, known = map(_leaves, plain)
        for key in given:  # OmegaConf does not say which
            if key in known and not any(other.startswith(f"{key}.") for other in known):
                value = OmegaConf.select(cfg, key)
                try:
                    OmegaConf.update(structured, key, value)
                except ConfigTypeError:
                    kind = "{name: value, ...}" if OmegaConf.is_list(value) else "a list"
                    raise UserError(f"{key}={value} must be {kind}") from None
        raise


def _check_references(schema: type, merged: Any) -> None:
    """Raises OmegaConf's errors for a ${...} that leads to another type than its key's: it looks at numbers and texts alone.

    One that leads to a group or a list is replaced by a copy of that as plain data.
    """
    structured = OmegaConf.structured(schema)
    plain: Any = OmegaConf.to_container(structured)
    for key in _leaves(plain):
        group, _, name = key.rpartition(".")
        if OmegaConf.is_interpolation(OmegaConf.select(merged, group) if group else merged, name):
            value = OmegaConf.select(merged, key)
            if OmegaConf.is_config(value):
                OmegaConf.update(merged, key, OmegaConf.to_container(value, resolve=True), merge=False)
            else:  # a text's own ${ would be followed in its turn
                OmegaConf.update(structured, key, value.replace("${", "") if isinstance(value, str) else value)


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
    if key in NOT_HERE:
        return UserError(f"{key}: {NOT_HERE[key]}")
    if parent in known and OmegaConf.select(cfg, parent) == {}:  # whose keys are another library's
        return UserError(f"{key} is not set yet; +{key}=VALUE adds it")
    # Names without their groups are compared: two names of one group would be near by the group's alone.
    full = {k.rpartition(".")[2]: k for k in sorted(known, key=lambda k: k.startswith(f"{parent}."))}  # its own group's come last
    close = near(leaf, full)
    return UserError(f"{key} is not a key{f'; did you mean {full[close]}?' if close else ''}; --help lists them")


# ---- checks before Hydra starts ----


@dataclass(frozen=True)
class Source:
    """Where a command's configuration comes from: the folders of YAML files, in the order in which Hydra looks, and its name."""

    folders: list[Path]
    name: str

    @classmethod
    def of(cls, conf: Path, name: str, flags: Flags) -> Source:
        """`conf`/`name`.yaml, or what the flags name instead. Raises UserError where there is no such folder or file."""
        for flag in ("--config-dir", "--config-path"):
            if flag in flags and not os.path.isdir(flags[flag]):
                raise UserError(f"{flag}={flags[flag]} is no folder; name one that holds YAML files, as conf/ does")
        folders = [Path(flags["--config-dir"])] if "--config-dir" in flags else []
        folders.append(Path(flags.get("--config-path", conf)))
        name = flags.get("--config-name", name).removesuffix(".yaml")
        if not any(os.path.isfile(folder / f"{name}.yaml") for folder in folders):
            there = sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))
            one_of("--config-name", name, there)
        return cls(folders, name)

    def options(self, group: str) -> list[str] | None:
        """The options of a group; None where there is no such group."""
        found = [folder / group for folder in self.folders if (folder / group).is_dir()]
        return sorted({path.stem for folder in found for path in folder.glob("*.yaml")}) if found else None

    @contextlib.contextmanager
    def opened(self) -> Iterator[ConfigLoader]:
        """Hydra with these folders, for `compose`."""
        *further, conf = self.folders
        with initialize_config_dir(str(conf.absolute()), version_base="1.3"):
            loader: Any = GlobalHydra.instance().config_loader()
            for folder in further:  # as Hydra's own main does
                path = loader.get_search_path()
                path.prepend("command-line", f"file://{folder.absolute()}", anchor=SearchPathQuery(provider="schema"))
                loader.repository.initialize_sources(path)
            yield loader


def check(source: Source, overrides: list[str], schema: type, sweep: bool, shows: bool = False) -> DictConfig:
    """Composes what the command line asks for and checks it, every point of a sweep; returns the (first) configuration with
    Hydra's own part.

    Whatever begins with `hydra` is Hydra's to judge. The points of a sweeper that searches are checked when its launcher gets them.
    shows: nothing will run, so that a value may still be missing.
    Raises UserError for an unknown key or group option (naming the nearest right one), a wrong type or an impossible combination.
    """
    with source.opened() as loader:
        asked = [command_line.parse_override(argument, loader) for argument in overrides]
        for override in asked if not sweep else ():
            if override.is_sweep_override():
                raise UserError(f"{override.input_line} names several values: add -m to run each, or write a list as [a,b]")
        if not any(override.key_or_group == "hydra.searchpath" for override in asked):  # which brings groups and options of its own
            defaults = compose(source.name, return_hydra_config=True)
            for override in asked:
                _check_key(source, defaults, override)
        cfg = _compose(source.name, command_line.one_point(asked))
        if not isinstance(followed(cfg, "hydra.verbose"), (bool, str, ListConfig)):  # which Hydra asserts
            raise UserError(f"hydra.verbose={cfg.hydra.verbose} must be true, false, the name of a logger or a list of them")
        if shows:
            return cfg
        if sweep and cfg.hydra.runtime.choices["hydra/sweeper"] == "basic":
            listed = [
                command_line.parse_override(f"{key}={value}", loader) for key, value in (cfg.hydra.sweeper.params or {}).items()
            ]
            if not listed and all(command_line.is_hydras(override.key_or_group) for override in asked):
                raise UserError("-m runs a sweep, and no key here has several values; KEY=A,B has (leave -m out to run once)")
            _check_points(source.name, command_line.points_of([*listed, *asked]), schema)
        else:
            fixed = [override.input_line or "" for override in asked if not override.is_sweep_override()]
            _check_either(source.name, cfg, fixed, schema)
    return cfg


def _check_key(source: Source, defaults: DictConfig, override: Override) -> None:
    """Raises UserError where the key, or the option of a group, is not there, and for a key that would be taken away."""
    key = override.key_or_group
    value = override.value()
    if override.is_sweep_override():  # an interval has no values to look at
        value = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
    asked = value if isinstance(value, list) else [value]
    if command_line.is_hydras(key):
        if "/" in key and not all(isinstance(option, str) for option in asked):
            raise UserError(f"{key}={value} is not the name of an option; --hydra-help lists Hydra's own")
        return
    parent = OmegaConf.select(defaults, key.rpartition(".")[0]) if "." in key else None
    if override.is_delete() and parent == {}:  # whose keys are another library's
        return
    options = source.options(key)
    if options is None and not override.is_add() and not override.is_force_add() and not _has(defaults, key):
        raise _unknown_key(key, without_hydra(defaults))
    if override.is_delete():
        instead = f"{key}=OPTION takes another ({', '.join(options)})" if options else f"{key}=VALUE sets another one"
        raise UserError(f"~{key}: what is in the configuration cannot be taken away; {instead}")
    if options is not None:
        for option in asked:
            one_of(key, str(option), options)


def followed(cfg: DictConfig, key: str) -> Any:
    """The value of a key of Hydra's. Raises UserError where it refers to what is not there."""
    try:
        return OmegaConf.select(cfg, key)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{key}: {reason[0].lower()}{reason[1:]}; \\${{ is the text ${{") from None


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
        lines = [f"{apart}: {reason}" for apart, reason in wrong]
        raise UserError(f"{len(wrong)} of {len(points)} points cannot run, and none was started:", lines)


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
