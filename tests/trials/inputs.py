"""Fresh bad and odd inputs for every key of every command: `python tests/trials/inputs.py n=300 seed=0`.

Each is drawn from the schema itself (a wrong type, an extreme number, a text with quotes, a key that is nearly right, a flag) and
given to the real command, in a process of its own that ends where the work itself would begin. It must be taken (exit code 0) or
refused (exit code 2) with one line, quickly and with nothing left behind.
"""
# ruff: noqa: E402  # the environment and the path come before what they are for

from __future__ import annotations

import os
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent] + [str(ROOT)]
from tests.trials import forks  # first: it sets the environment

# isort: split
from flash_ladder import schema, script_schema
from flash_ladder.benchmark import grid
from flash_ladder.export import export
from flash_ladder.flags import SHORT, TAKES
from flash_ladder.machine import doctor  # noqa: F401
from flash_ladder.model import generation
from flash_ladder.script_schema import ExportConfig
from flash_ladder.sweep import report  # noqa: F401
from flash_ladder.training import run
from tests.helpers.made_up import made_up_run
from tests.helpers.tiny import overrides, tiny_config

SECONDS = 20.0  # after which a process counts as hanging
QUICK = 5.0  # within which a refusal must come, data read and all
BYTES = 8 << 30  # of address space that a process may take beyond what torch has mapped

# fmt: off
NUMBERS = (
    "-1", "0", "1", "7", "100000", "1000000000", "100000000000", str(10**14), str(2**63 - 1), str(2**63), str(-(2**63) - 1),
    str(10**22), "9" * 5000, "1e400", "-1e400", "nan", "inf", "-inf", "1e-300", "1e300", "1e30", "0.1", "1_000", "0x10", "1e5",
)
TEXTS = (
    "x", "", "null", "true", "???", "1.5", "[1]", "[]", "[a", "{a: 1}", "{}", "None", "auto", "a,b", "1,2", "it's", 'a"b', "'a'",
    "a b", " a ", "ü漢字😀", "${x}", "${seed}", "${", "\\", "a\\", "\\'", "(", ")", "a=b", "#", "a;b|c&d", "~", "~/x", "$HOME", "*",
    "/", ".", "..", "/dev/null", "/proc/self/mem", "/root/none", "none/none", "a" * 300, "a/" * 2500, "\n", "\t", "\x1b[31m", "%s",
    "choice(1,2)", "range(1,3)", "interval(0,1)", "glob(*)", "2026_11_29", "2e3", "12e4567", "@x", "-", "--", "\udcff", "[x]*",
)
# fmt: on


def reached(*args: object, **kwargs: object) -> None:
    """The work itself would begin here."""
    raise SystemExit(0)


@dataclass(frozen=True)
class Command:
    """A command, the schema of its keys, and what makes it run here."""

    path: str
    schema: type
    base: list[str]

    def keys(self) -> list[str]:
        return list(leaves(self.schema))


def leaves(kind: type, prefix: str = "") -> Iterator[str]:
    """Every key of a schema in dotted form."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def commands(folder: Path) -> list[Command]:
    """Every command, on a tiny run and an exported model in `folder`."""
    made_up_run(folder)
    export.export_run(ExportConfig(run=str(folder / "run"), wandb="disabled"))
    tiny = [o for o in overrides(tiny_config(folder)) if not o.endswith("=null")]
    found, exported = f"run={folder / 'run'}", f"model={folder / 'run' / 'export'}"
    return [
        Command("train.py", schema.Config, tiny),
        Command("scripts/generate.py", script_schema.GenerateConfig, [exported, "max_new_tokens=3"]),
        Command("scripts/evaluate.py", script_schema.EvaluateConfig, [exported, "windows=2"]),
        Command("scripts/export.py", script_schema.ExportConfig, [found, "out=exported", "windows=2"]),
        Command("scripts/benchmark_attention.py", script_schema.BenchmarkConfig, []),
        Command("scripts/doctor.py", script_schema.DoctorConfig, []),
        Command("scripts/report.py", script_schema.ReportConfig, [f"runs={folder / 'run'}", "out=report"]),
        Command("scripts/tune_tiles.py", script_schema.TuneConfig, []),
    ]


HYDRAS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.launcher.time_limit", "hydra.verbose", "hydra/launcher", "hydra.job.name")


def drawn(command: Command, random: random.Random) -> list[str]:
    """One or two odd arguments for a command."""
    keys = command.keys()

    def argument() -> str:
        key, kind = random.choice(keys), random.random()
        value = random.choice(NUMBERS if random.random() < 0.5 else TEXTS)
        if kind < 0.75:
            return f"{key}={value}"
        if kind < 0.80:
            return f"{random.choice(('+', '++', '~'))}{key}{random.choice(('', f'={value}'))}"
        if kind < 0.88:  # nearly right
            at = random.randrange(len(key))
            return f"{key[:at]}{random.choice(('', key[at] * 2, 'x', '.', '='))}{key[at + 1 :]}={value}"
        if kind < 0.92:
            return f"{random.choice(HYDRAS)}={value}"
        if kind < 0.95:
            return random.choice((key, f"={value}", value, "seed", "", "="))
        return random.choice((*TAKES, *SHORT)) + random.choice(("", f"={value}", "=job"))

    return [argument() for _ in range(random.choice((1, 1, 1, 2)))]


# ---- one trial ----


@dataclass(frozen=True)
class Trial:
    """What became of an input; `faults` is empty where all is well."""

    arguments: list[str]
    code: int
    seconds: float
    said: str
    faults: list[str]


def tried(command: Command, odd: list[str], folder: Path) -> Trial:
    """Runs a command with odd arguments after its own in a fork of this process, in a folder of its own."""
    here = Path(tempfile.mkdtemp(dir=folder))
    said, start = folder / "stderr", time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(as_child(command, odd, here, said))
    code = awaited(child, start)
    seconds = time.monotonic() - start
    text = said.read_text(encoding="utf-8", errors="replace")
    left = sorted(path.relative_to(here).as_posix() for path in here.rglob("*"))
    shutil.rmtree(here)
    return Trial([command.path, *odd], code, seconds, text, list(faults(code, seconds, text, left)))


def as_child(command: Command, odd: list[str], here: Path, said: Path) -> int:
    """The forked process: returns its exit code."""

    def work() -> None:
        os.chdir(here)
        os.setsid()  # what it starts is ended with it
        nowhere, file = os.open(os.devnull, os.O_RDWR), os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for target, source in ((0, nowhere), (1, nowhere), (2, file)):
            os.dup2(source, target)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + BYTES, mapped + BYTES))
        grid.measure_cell = run.Ranks = reached  # type: ignore[assignment,misc]
        pick, n = generation._pick, iter(range(20))
        generation._pick = lambda *args: pick(*args) if next(n, None) is not None else reached()  # type: ignore[assignment]
        sys.argv[:] = [command.path, *command.base, *odd]
        runpy.run_path(str(ROOT / command.path), run_name="__main__")

    return forks.exit_code(work)


def awaited(child: int, start: float) -> int:
    """The exit code of a process; −9 where it had to be killed."""
    while time.monotonic() - start < SECONDS:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def faults(code: int, seconds: float, said: str, left: list[str]) -> Iterator[str]:
    """What is wrong with the end of a command."""
    lines = [line for line in said.replace("\r", "\n").split("\n") if line.strip()]
    if "Traceback" in said:
        yield "traceback"
    if code not in (0, 2):
        yield "hangs" if code == -signal.SIGKILL else f"exit code {code}"
    if code == 2:
        if len(lines) != 1 or not lines[0].startswith("error: "):
            yield f"{len(lines)} lines"
        if left:
            yield f"left behind: {left[0]}"
        if seconds > QUICK:
            yield f"slow: {seconds:.1f} s"


def main(n: int, seed: int, show: Callable[[str], None] = print) -> int:
    """Tries `n` inputs, and says what was found; returns the number of faults."""
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        here = commands(Path(name))
        for _ in range(n):
            command = draw.choices(here, [len(command.keys()) for command in here])[0]
            trial = tried(command, drawn(command, draw), Path(name))
            counts["wrong" if trial.faults else {0: "taken", 2: "refused"}[trial.code]] += 1
            for fault in trial.faults:
                arguments = " ".join(repr(argument[:100]) for argument in trial.arguments)
                show(f"{fault}: {arguments}\n    {' | '.join(trial.said.strip().splitlines()[-3:])[:300]}")
    show(f"{n} inputs (seed {seed}): {counts['taken']} taken, {counts['refused']} refused with a line, {counts['wrong']} wrong")
    return counts["wrong"]


if __name__ == "__main__":
    given = {"n": 300, "seed": 0} | {key: int(value) for key, _, value in (argument.partition("=") for argument in sys.argv[1:])}
    sys.exit(1 if main(**given) else 0)
