"""Hydra's launcher `processes`, train.py's default under -m: every point of a sweep in a process of its own.

Hydra's own sweeper hands over all points at once, others a few at a time and pick the next by the losses that come back. A point
that fails gives them inf, and the sweep goes on.
"""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from flash_ladder.composition import parse, without_hydra
from flash_ladder.errors import UserError, argument
from flash_ladder.flags import FILES, split, typed
from flash_ladder.front_door import fail
from flash_ladder.schema import Config
from flash_ladder.sweep.gpus import Pool, gpus_here, gpus_needed
from flash_ladder.sweep.points import LOCK, Point, Sweep
from flash_ladder.sweep.process import CONSOLE, read_result, still_runs
from flash_ladder.sweep.runner import Limits, Runner
from flash_ladder.training.metrics import VAL_LOSS

PLUGIN = "hydra_plugins.flash_ladder"  # this module's name among Hydra's plugins
# What Hydra is told about the sweep, and a point must not be.
OF_THE_SWEEP = ("hydra.mode", "hydra.sweep", "hydra.sweeper", "hydra.launcher", "hydra/sweeper", "hydra/launcher", "hydra.run.dir")


@dataclass
class ProcessesConfig:
    """hydra.launcher.KEY=VALUE."""

    _target_: str = f"{PLUGIN}.ProcessLauncher"
    time_limit: float | None = None  # minutes that a point may take; null: as long as it likes
    grace: float = 60.0  # seconds that a point has to stop by itself, before it is killed
    at_once: int | None = None  # points side by side; null: as many as there are GPUs for, and on the CPU one
    go_on: bool = False  # set by sweep=FOLDER: takes up the sweep that is in the folder


def register() -> None:
    """Makes hydra/launcher=processes known to Hydra.

    Hydra takes launchers from the package hydra_plugins alone, and looks them up there by name. So this module gets a name in it.
    """
    plugins = Plugins.instance()  # imports the package where any plugin is installed
    package = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    sys.modules[PLUGIN] = package.flash_ladder = sys.modules[__name__]  # type: ignore[attr-defined]
    plugins.register(ProcessLauncher)
    ConfigStore.instance().store(group="hydra/launcher", name="processes", node=ProcessesConfig, provider="flash_ladder")


class ProcessLauncher(Launcher):
    """Runs every point in a process of its own, and returns its validation loss; inf where there is none."""

    __module__ = PLUGIN

    def __init__(self, time_limit: float | None, grace: float, at_once: int | None, go_on: bool) -> None:
        self.time_limit, self.grace, self.at_once, self.go_on = time_limit, grace, at_once, go_on
        self.sweep: Sweep | None = None  # from the first launch on
        self.pool: Pool | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs the points; their numbers begin at `initial_job_idx`. On Ctrl-C it ends the process, with what is done kept."""
        try:
            return self._launch([list(overrides) for overrides in job_overrides], initial_job_idx)
        except UserError as error:
            remove_bare(Path(self.config.hydra.sweep.dir))
            fail(error)

    def _launch(self, points: list[list[str]], first: int) -> list[JobReturn]:
        limits = self._limits()
        sweep = self._open()
        composing = tqdm(points, desc="composing", unit="point", leave=False, delay=2)
        configs = {number: self._configuration(number, overrides) for number, overrides in enumerate(composing, first)}
        mine = [sweep.place(n, points[n - first], str(cfg.hydra.sweep.subdir)) for n, cfg in configs.items()]
        gpus_of = self._gpus({point.number: configs[point.number] for point in mine if not point.is_good}, sweep)
        sweep.save()
        if gpus_of:
            assert self.pool is not None
            if first == 0:  # a sweeper that searches asks again and again
                print(f"sweep on {self.pool}; {sweep.folder}/POINT/console.log has what each point says", flush=True)
            signum = Runner(sweep, self._script(), self.pool, limits).run(gpus_of)
            if signum:
                print(
                    f"interrupted; to go on: python {shlex.quote(sys.argv[0])} {argument('sweep', sweep.folder)}",
                    file=sys.stderr,
                )
                sys.exit(128 + signum)
        return [returned(point, sweep.folder_of(point), configs[point.number]) for point in mine]

    def _limits(self) -> Limits:
        for name, value in (("time_limit", self.time_limit), ("at_once", self.at_once)):
            if value is not None and not value > 0:
                raise UserError(f"hydra.launcher.{name}={value} must be more than 0; null leaves it out")
        if not self.grace >= 0:
            raise UserError(f"hydra.launcher.grace={self.grace} must be at least 0 seconds")
        return Limits(None if self.time_limit is None else 60 * self.time_limit, self.grace, self.at_once)

    def _open(self) -> Sweep:
        """The sweep's record, opened at the first call. Raises UserError where points of an earlier start still run."""
        if self.sweep is None:
            folder = Path(self.config.hydra.sweep.dir)
            kept = [
                o for o in self._asked("hydra") if not o.startswith(("hydra.sweep.dir=", "hydra.mode=", "hydra.launcher.go_on="))
            ]
            self.sweep = Sweep.open(folder, sys.orig_argv[1:], [*self._asked("task"), *kept], self.go_on)
            for point in self.sweep.points:
                if still_runs(self.sweep.folder_of(point)):
                    raise UserError(
                        f"sweep={folder}: point {point.number} still runs, from a sweep that was killed; end it first "
                        f"(fuser {self.sweep.folder_of(point) / CONSOLE} names it)"
                    )
        return self.sweep

    def _asked(self, whose: str) -> list[str]:
        """The overrides of `task` or `hydra` as they were given: an interpolation in them is for each point to follow."""
        asked: Any = OmegaConf.to_container(self.config.hydra.overrides[whose], resolve=False)
        return asked

    def _configuration(self, number: int, overrides: list[str]) -> DictConfig:
        cfg = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(cfg):
            cfg.hydra.job.id = cfg.hydra.job.num = number
        return cfg

    def _gpus(self, configs: dict[int, DictConfig], sweep: Sweep) -> dict[int, int]:
        """How many GPUs each point takes, for those that can run. A point whose configuration is refused has failed: a sweeper that
        searches may ask for one, and the points of all others were checked before Hydra started.
        """
        trainers = {}
        for point in sweep.points:
            if point.number in configs:
                try:
                    trainers[point.number] = parse(without_hydra(configs[point.number]), Config).trainer
                except UserError as error:
                    point.status, point.error, point.exit_code = "failed", str(error), 2
        if self.pool is None and trainers:
            self.pool = Pool(gpus_here() if any(trainer.accelerator != "cpu" for trainer in trainers.values()) else [])
        return {number: gpus_needed(trainer, len(self.pool.gpus)) for number, trainer in trainers.items()} if self.pool else {}

    def _script(self) -> list[str]:
        """train.py, and what Hydra needs to find the same configuration files and to treat a run as asked."""
        found = typed({flag: value for flag, value in split(sys.argv[1:])[0].items() if flag in FILES})
        hydras = [o for o in self._asked("hydra") if not o.lstrip("+~").startswith(OF_THE_SWEEP)]
        return [str(Path(sys.argv[0]).absolute()), *found, *hydras]


def remove_bare(folder: Path) -> None:
    """Removes the folder of a sweep that never began: one that holds nothing but Hydra's notes and the lock."""
    if {path.name for path in folder.iterdir()} <= {"multirun.yaml", LOCK}:
        shutil.rmtree(folder)


def returned(point: Point, folder: Path, cfg: DictConfig) -> JobReturn:
    """What Hydra's sweepers get of a point: always a completed job, since a failed one would end the sweep.

    Its value is the validation loss of a finished run. A point without one gives inf, the worst there is: optuna's sweeper goes on
    after inf, and neither after nan nor after a failed job.
    """
    result: dict[str, Any] = read_result(folder) or {}
    loss = result.get("metrics", {}).get(VAL_LOSS) if point.status == "finished" else None
    job = JobReturn(
        overrides=point.overrides,
        cfg=without_hydra(cfg),
        hydra_cfg=OmegaConf.masked_copy(cfg, "hydra"),
        working_dir=str(Path.cwd()),
    )
    job.status, job.task_name = JobStatus.COMPLETED, cfg.hydra.job.name
    job.return_value = math.inf if loss is None else float(loss)
    return job
