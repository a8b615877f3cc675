"""What can go wrong with wandb in a run: `python tests/trials/wandb_failures.py seed=0`, all cases, each once.

Its service is killed or stopped at a drawn step, its variables have bad values, or its import fails. The run must end with exit
code 0, with every loss in metrics.jsonl, at most one warning, and no process left, within the bounds of training/wandb_copy.py.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: it has a folder `kernels`, which is a library's name too
from tests.trials import forks  # first: it sets the environment

# isort: split
from flash_ladder.processes import children
from flash_ladder.training import run, wandb_copy
from flash_ladder.training.module import GPTModule
from tests.helpers.tiny import metrics, overrides, tiny_config

STEPS = 12
BOUND = wandb_copy.INIT_TIMEOUT * 2 + wandb_copy.FINISH_TIMEOUT + 2 * wandb_copy.CALL_TIMEOUT  # seconds that wandb may cost
PLACES: dict[str, tuple[Any, str, int]] = {
    "at a step": (GPTModule, "training_step", STEPS),
    "at its end": (run, "write_sample", 1),
}
BROKEN = "raise RuntimeError('this installation is broken')"
BAD = ("", "garbage", "-1", "a/b:c", "ü漢字", "a" * 300)
# fmt: off
VARIABLES = (
    "WANDB_MODE", "WANDB_SILENT", "WANDB_RUN_ID", "WANDB_SERVICE", "WANDB_BASE_URL", "WANDB_INIT_TIMEOUT", "WANDB_RESUME",
    "WANDB_DIR", "WANDB_TAGS", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_CONFIG_DIR", "WANDB_API_KEY",
    "WANDB_X_STATS_SAMPLING_INTERVAL",
)
# fmt: on


@dataclass(frozen=True)
class Case:
    """A way for wandb to fail."""

    name: str
    variables: tuple[tuple[str, str], ...] = ()
    signum: int = 0  # sent to its service
    place: str = ""
    is_broken: bool = False  # its import fails


def cases(draw: random.Random) -> list[Case]:
    """Every case, the slow ones first; draws which bad values a variable gets."""
    signals = [(place, signum) for place in PLACES for signum in (signal.SIGSTOP, signal.SIGKILL)]
    killed = [Case(f"{signum.name} {place}", signum=signum, place=place) for place, signum in signals]
    online = [Case("no server", (("WANDB_MODE", "online"), ("WANDB_BASE_URL", "http://127.0.0.1:9"), ("WANDB_API_KEY", "0" * 40)))]
    bad = [Case(f"{name}={value[:20]}", ((name, value),)) for name in VARIABLES for value in draw.sample(BAD, 2)]
    return [*killed, *online, Case("its import fails", is_broken=True), *bad]


def tried(drawn: tuple[str, Case, Path, object]) -> tuple[str, float, list[str], str]:
    """Runs a case: its name, the seconds that it took, what is wrong with it, and what the run said."""
    seed, case, base, expected = drawn
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def before() -> None:
            os.environ.update(case.variables)
            os.environ.setdefault("WANDB_CONFIG_DIR", str(folder / "home"))
            if case.is_broken:
                (folder / "wandb").mkdir()
                (folder / "wandb" / "__init__.py").write_text(BROKEN)
                sys.path.insert(0, str(folder))
            if case.signum:
                strike_at(*PLACES[case.place], case.signum, draw)

        end = forks.forked("train.py", [*given(base), f"hydra.run.dir={folder / 'run'}"], folder, before)
        wrong = [*end.faults()] + ([f"exit code {end.code}"] if end.code else [])
        if not (folder / "run" / "metrics.jsonl").exists() or losses(folder / "run") != expected:
            wrong.append("other losses, or other steps")
        if sum(line.startswith("warning: ") and "wandb" in line for line in end.lines) > 1:
            wrong.append("more than one warning")
        if end.seconds > BOUND:
            wrong.append(f"{end.seconds:.0f} s")
        if case.signum and "wandb stopped working" not in end.said:
            wrong.append("no word of it")
        return case.name, end.seconds, wrong, " | ".join(end.lines[-5:])


def strike_at(owner: Any, name: str, times: int, signum: int, draw: random.Random) -> None:
    """Lets this process send a signal to wandb's service once it comes by a place, for which the number is drawn."""
    real, left = getattr(owner, name), iter(range(draw.randrange(times)))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            for pid in children(wandb_copy.SERVICE):
                os.kill(pid, signum)
        return real(*args, **kwargs)

    setattr(owner, name, counted)


def given(folder: Path) -> list[str]:
    """The command line of the run, without what wandb's variables may say."""
    arguments = overrides(tiny_config(folder, max_steps=STEPS, val_every=4))
    return [argument for argument in arguments if not argument.startswith("logger.")]


def losses(run_dir: Path) -> list[tuple[int, str, float]]:
    """Every loss that a run recorded."""
    return [(row["step"], name, row[name]) for row in metrics(run_dir) for name in ("train/loss", "val/loss") if name in row]


def main(seed: int, show: Callable[[str], None] = print) -> int:
    """Runs all cases, and says what became of them; returns how many went wrong."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        end = forks.forked("train.py", [*given(base), "logger.mode=disabled", f"hydra.run.dir={base / 'run'}"], base)
        assert end.code == 0, end.said
        expected, every, bad = losses(base / "run"), cases(random.Random(seed)), 0
        drawn = [(f"{seed}/{case.name}", case, base, expected) for case in every]
        with get_context("fork").Pool(2) as pool:
            for case, seconds, wrong, said in pool.imap_unordered(tried, drawn, chunksize=1):
                bad += bool(wrong)
                show(f"{case:44}{seconds:6.1f} s  {'; '.join(wrong) + ': ' + said if wrong else 'nothing lost'}")
    show(f"{len(every)} failures of wandb (seed {seed}), {bad} with something lost")
    return bad


if __name__ == "__main__":
    values = {"seed": 0} | {key: int(value) for key, _, value in (argument.partition("=") for argument in sys.argv[1:])}
    sys.exit(1 if main(**values) else 0)
