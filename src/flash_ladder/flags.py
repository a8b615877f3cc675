"""The flags of a command, which are Hydra's: which there are, what each takes, and what to type instead of one that is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flash_ladder.errors import UserError, near, one_of

SHORT = {
    "-h": "--help",
    "-m": "--multirun",
    "-r": "--run",
    "-c": "--cfg",
    "-p": "--package",
    "-i": "--info",
    "-sc": "--shell-completion",
    "-cn": "--config-name",
    "-cd": "--config-dir",
    "-cp": "--config-path",
}
# What a flag takes: () nothing, None any text, else one of these. Left out is --experimental-rerun, which unpickles a file.
TAKES: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(("--help", "--hydra-help", "--version", "--multirun", "--run", "--resolve", "--shell-completion"), ()),
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "--package": None,
    "--config-name": None,
    "--config-dir": None,
    "--config-path": None,
}
FILES = ("--config-name", "--config-dir", "--config-path")  # where the configuration comes from
HELP = ("--help", "--hydra-help")
SHOW = (*HELP, "--cfg", "--info")  # print something, and run nothing
ONE_RUN = ("--cfg", "--info", "--run", "--shell-completion")

Flags = Mapping[str, str]  # the flags by their long names, with their values ("" where they take none)


def split(arguments: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The flags among the arguments of a command, and the rest. Raises UserError for a flag that is none, or lacks its value."""
    flags: dict[str, str] = {}
    others: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            others.append(argument)
            continue
        typed, equals, value = argument.partition("=")
        name = SHORT.get(typed, typed)
        if name not in TAKES:
            bare = typed.lstrip("-")
            close = near(bare, [known.lstrip("-") for known in TAKES])
            meant = f"did you mean --{close}?" if close else f"values have no dashes: {bare}={value or 'VALUE'}; --help lists them"
            raise UserError(f"{typed} is not a flag; {meant}")
        takes = TAKES[name]
        if takes == ():
            if equals:
                raise UserError(f"{argument}: {typed} takes no value")
        elif name == "--info" and not equals:
            value = rest.pop(0) if rest and rest[0] in (takes or ()) else "all"
        elif not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("-") else ""
        if takes != () and not value:
            raise UserError(f"{typed} needs a value, as in {name}={takes[0] if takes else 'NAME'}")
        if takes:
            one_of(typed, value, takes)
        flags[name] = value
    return flags, others


def typed(flags: Flags) -> list[str]:
    """Flags as they are typed."""
    return [f"{name}={value}" if value else name for name, value in flags.items()]


def check(flags: Flags, overrides: list[str]) -> None:
    """Raises UserError for flags that mean nothing together, or alone."""
    ways = [name for name in (*ONE_RUN, "--multirun") if name in flags]
    if len(ways) > 1:
        what = " is about one run: leave -m out" if "--multirun" in ways else f" and {ways[1]} exclude each other; take one"
        raise UserError(f"{ways[0]}{what}")
    for name, beside in (("--resolve", ("--cfg", "--help")), ("--package", ("--cfg",))):
        if name in flags and not any(other in flags for other in beside):
            raise UserError(f"{name} goes with {' or '.join(beside)}, as in --cfg=job {' '.join(typed({name: flags[name]}))}")
    if "--shell-completion" in flags and not any(o.startswith(("install=", "uninstall=", "query=")) for o in overrides):
        raise UserError("--shell-completion needs install=SHELL or uninstall=SHELL, as in --shell-completion install=bash")
