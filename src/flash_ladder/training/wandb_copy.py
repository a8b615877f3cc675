"""wandb's copy of a run: charts over the optimiser step, the best loss in the summary, what attention saves in a table and bars.

metrics.jsonl is the record, and wandb must not stop or delay a run. A server that is down costs a bounded wait at the start
(INIT_TIMEOUT) and at the end (FINISH_TIMEOUT), and a service (the process wandb-core) that hangs is killed (CALL_TIMEOUT). Whatever
fails in wandb costs one warning, a WANDB_* variable that it refuses included. Only a value of logger.* is refused before the run.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from packaging.version import Version

from flash_ladder.errors import UserError, first_line
from flash_ladder.files import read_json, write_json
from flash_ladder.measure.probe import Probe
from flash_ladder.processes import children
from flash_ladder.schema import LoggerConfig
from flash_ladder.training import metrics as names
from flash_ladder.training.log import warn
from flash_ladder.training.record import best_validation, read_metrics
from flash_ladder.units import GIB

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT = 20  # seconds that wandb may take to reach its server before the run goes on offline
FINISH_TIMEOUT = 30  # seconds that it may take at the end to send what is left
CALL_TIMEOUT = 20  # seconds beyond these, and in any other call, after which wandb's service is taken for hung
SERVICE = "wandb-core"  # the name of its process
PROJECT = "flash-ladder"  # where neither logger.project nor wandb's own settings name one
STEP = "trainer/global_step"  # Lightning's name for the optimiser steps taken: the x axis of every chart
SETTINGS = {  # a key of LoggerConfig and what wandb.Settings calls it
    "project": "project",
    "entity": "entity",
    "name": "run_name",
    "group": "run_group",
    "job_type": "run_job_type",
    "tags": "run_tags",
    "notes": "run_notes",
}
LEET = Version("0.28")  # the first wandb with the command `wandb leet`
PATIENT = Version("0.29")  # versions before it retry init's first request for minutes, whatever init_timeout says

# ---- starting and going on ----


def open_wandb(cfg: LoggerConfig, run_dir: Path, config: dict[str, Any]) -> WandbCopy | None:
    """Starts wandb for a run, in `run_dir`/wandb; None where it is disabled or cannot start. `config`: the run's, as plain data.

    A value of `cfg` comes before wandb's environment variables and settings files, and those before the recipe's own defaults. A
    resumed run goes on under the same wandb id, unless WANDB_RUN_ID names another. Where the server cannot be reached, the run is
    kept offline for `wandb sync`, and one warning says so.
    """
    about = {key: getattr(cfg, key) for key in SETTINGS} | {"config": config}
    run_id = None if "WANDB_RUN_ID" in os.environ else recorded_run(run_dir).get("id")
    copy = _start(run_dir, about, cfg.mode, run_id)
    if copy is not None:
        copy.remember(config)
    return copy


def continue_wandb(folder: Path, about: dict[str, Any], mode: str | None) -> WandbCopy | None:
    """Goes on with a run that ended, in `folder`/wandb; None as in open_wandb. `about`: the run, as `recorded_run` gives it.

    mode: offline, online or disabled; None: what the environment says, or else the mode of the run.
    """
    return _start(folder, about, asked_mode(mode) or about.get("mode"), about["id"])


def asked_mode(mode: str | None) -> str | None:
    """The mode that logger.mode or the environment asks for; None where neither does."""
    if mode is None and os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled"  # other libraries' variable, which wandb itself does not read
    return mode or os.environ.get("WANDB_MODE")


def recorded_run(run_dir: Path) -> dict[str, Any]:
    """What wandb knows a run by: id, mode, config and the keys of SETTINGS; empty for a run without wandb."""
    file = run_dir / "wandb" / "run.json"
    if file.is_file():
        return read_json(file)
    earlier = run_dir / "wandb" / "id"  # all that earlier versions wrote
    return {"id": earlier.read_text()} if earlier.is_file() else {}


def check_wandb(cfg: LoggerConfig) -> None:
    """Raises UserError for a value of `cfg` that wandb refuses; silent about all that may fail later."""
    if asked_mode(cfg.mode) == "disabled":
        return
    try:
        from wandb import Settings
        from wandb.errors import UsageError
    except Exception:
        return  # open_wandb warns of it
    try:
        Settings(**_chosen(vars(cfg)))
    except (ValueError, UsageError) as error:
        raise UserError(f"wandb refuses a value of logger: {_refused(error)}") from None


def _chosen(about: dict[str, Any]) -> dict[str, Any]:
    """The keys of LoggerConfig that are set, as wandb.Settings calls them."""
    return {SETTINGS[key]: about[key] for key in SETTINGS if about.get(key) is not None}


def _settings(about: dict[str, Any]) -> tuple[wandb.Settings, wandb.Settings]:
    """The settings of a run, and wandb's own, of WANDB_* variables and settings files."""
    import wandb

    bounded: dict[str, Any] = {
        "silent": True,
        "console": "off",
        "init_timeout": INIT_TIMEOUT,
        "login_timeout": INIT_TIMEOUT,
        "finish_timeout": FINISH_TIMEOUT,
    }
    if Version(wandb.__version__) < PATIENT:
        wait = INIT_TIMEOUT / 5
        bounded |= {"x_graphql_timeout_seconds": wait, "x_graphql_retry_max": 1, "x_graphql_retry_wait_max_seconds": wait}
    chosen = _chosen(about)
    own = wandb.setup(wandb.Settings(**bounded)).settings
    if own.sweep_id is not None:
        bounded["stop_fn"] = _leave_to_agent
    elif own.project is None:
        chosen.setdefault("project", PROJECT)
    return wandb.Settings(**bounded, **chosen), own


def _start(run_dir: Path, about: dict[str, Any], mode: str | None, run_id: str | None) -> WandbCopy | None:
    mode = asked_mode(mode)
    if mode == "disabled":
        return None  # before the import, which takes a second
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("HOME", "")
    if not os.access(home, os.W_OK):  # where the service cannot keep its own log, it writes it on the screen
        os.environ.setdefault("WANDB_CACHE_DIR", str(run_dir / "wandb" / "cache"))
    try:
        import wandb

        settings, own = _settings(about)
    except Exception as error:  # such as a broken installation, or a WANDB_* variable that it refuses
        warn(f"wandb could not start ({_refused(error)}); going on without it")
        return None

    if mode is None:
        default = "offline" if own.sweep_id is None else "online"  # `wandb agent` needs its runs online
        mode = own.mode if "mode" in own.model_fields_set else default
    mode = {"run": "online", "dryrun": "offline"}.get(mode, mode)  # wandb's older words
    if mode == "disabled":
        return None
    failures = []
    attempts: Any = ("offline",) if mode == "offline" else (mode, "offline")
    for attempt in attempts:
        try:
            with bounded(INIT_TIMEOUT * 2 + CALL_TIMEOUT):  # its login and its first request
                run = wandb.init(
                    mode=attempt, dir=run_dir, config=about.get("config"), id=run_id, resume="allow", settings=settings
                )
                copy = WandbCopy(run, run_dir, mode)
        except Exception as error:  # whatever it is, the run goes on
            failures.append(first_line(error))
            continue
        if failures:
            warn(f"wandb is offline ({failures[0]}); `{_sync(run_dir)}` uploads the run later")
        return copy
    warn(f"wandb could not start ({failures[-1]}); going on without it")
    return None


def _leave_to_agent() -> None:
    """What a run of `wandb agent` does on wandb's own stop request: nothing. The agent sends SIGTERM, and a second signal kills."""


def _refused(error: Exception) -> str:
    """What a pydantic or wandb error says of a value, in one line."""
    if not hasattr(error, "errors"):
        return first_line(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}={first['input']} ({first['msg']})"


def _sync(run_dir: Path) -> str:
    """The command that uploads an offline run. Without WANDB_RESUME the second of several parts would replace the first."""
    several = len(list(run_dir.glob("wandb/offline-run-*"))) > 1
    return f"{'WANDB_RESUME=allow ' * several}wandb sync {shlex.quote(str(run_dir))}/wandb/offline-run-*"


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Kills wandb's service where what is inside takes longer. A call that waits for the service then fails instead of hanging."""
    timer = threading.Timer(seconds, _kill_service)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _kill_service() -> None:
    for pid in children(SERVICE):
        os.kill(pid, signal.SIGKILL)


# ---- logging ----


class WandbCopy(WandbLogger):
    """Lightning's wandb logger on an open run. If wandb fails later, one warning says so and training goes on without it."""

    def __init__(self, run: wandb.Run, run_dir: Path, mode: str) -> None:
        super().__init__(experiment=run)
        self.run = run
        self.run_dir = run_dir
        self.mode = mode  # as asked for: "online" also where the server could not be reached
        self.failed = self.told = False
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        # A run that goes on offline would begin with an empty summary.
        earlier = read_metrics(run_dir / "metrics.jsonl")
        self.best = best_validation(earlier)
        self.last_step = max((line["step"] for line in earlier), default=0)
        latest = {name: value for line in earlier for name, value in line.items() if "/" in name}
        if latest:
            run.summary.update(latest | self._best())

    def remember(self, config: dict[str, Any]) -> None:
        """Writes wandb/run.json, which `recorded_run` reads."""
        settings = self.run.settings
        known = {"id": self.run.id, "mode": self.mode, **{key: getattr(settings, name) for key, name in SETTINGS.items()}}
        self._unless_failed(lambda: write_json(self.run_dir / "wandb" / "run.json", known | {"config": config}))

    def _best(self) -> dict[str, float]:
        return {} if self.best is None else {names.VAL_BEST: self.best[0], names.VAL_BEST_STEP: self.best[1]}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs at an optimiser step; with a validation's loss also the lowest so far and its step, for the summary."""
        loss = metrics.get(names.VAL_LOSS)
        if step is not None and loss is not None:
            self.best = min(self.best or (loss, step), (loss, step))
            metrics = {**metrics, **self._best()}
        self._unless_failed(lambda: self._log(metrics, step))

    def _log(self, values: Mapping[str, Any], step: int | None) -> None:
        """One call of wandb's log. Its own count of rows is the optimiser step too, for tools that know no other axis."""
        if step is None:
            self.run.log(dict(values))
        else:  # a row before the latest one would be dropped: what a resumed run repeats joins the latest
            self.run.log({**values, STEP: step}, step=max(step, self.run.step))

    def _unless_failed(self, action: Callable[[], None], more_seconds: float = 0.0) -> None:
        if self.failed:
            return
        try:
            with bounded(CALL_TIMEOUT + more_seconds):
                action()
        except Exception as error:  # whatever wandb raises must not stop the run
            self.failed = True
            if not self.told:
                warn(f"wandb stopped working ({first_line(error)}); metrics.jsonl goes on")
            self.told = True

    def log_savings(self, probe: Probe, step: int) -> None:
        """What one attention layer saves beside eager: its figures as a table, memory and time as bars."""
        self._unless_failed(lambda: self._log(savings(probe), step))

    def log_sample(self, prompt: str, text: str, step: int) -> None:
        """Text that the model of this step wrote, as a table."""

        def action() -> None:
            import wandb

            self._log({names.VAL_SAMPLE: wandb.Table(columns=["step", "prompt", "text"], data=[[step, prompt, text]])}, step)

        self._unless_failed(action)

    def log_evaluation(self, row: dict[str, Any], figures: Mapping[str, float], step: int) -> None:
        """Figures of the model of this step, and the same and more as a table of one row, behind the last row of the run."""

        def action() -> None:
            import wandb

            table = wandb.Table(columns=list(row), data=[list(row.values())])
            self.run.log({**figures, names.EVAL_TABLE: table, STEP: step}, step=max(self.last_step + 1, self.run.step))

        self._unless_failed(action)

    def log_report(self, columns: list[str | int], rows: list[list[Any]], pictures: Mapping[str, Path]) -> None:
        """A sweep's points as a table, and its pictures by name."""

        def action() -> None:
            import wandb

            images = {f"{names.SWEEP_PICTURES}/{name}": wandb.Image(str(path)) for name, path in pictures.items()}
            self.run.log({names.SWEEP_TABLE: wandb.Table(columns=columns, data=rows), **images})

        self._unless_failed(action)

    def how_to_look(self) -> str:
        """Where to look at the run: its page, or for an offline run the commands that this version of wandb has."""
        import wandb

        if not self.run.offline:
            return str(self.run.url)
        run_dir = self.run_dir.relative_to(Path.cwd()) if self.run_dir.is_relative_to(Path.cwd()) else self.run_dir
        upload = f"{_sync(run_dir)} uploads it"
        if Version(wandb.__version__) < LEET:
            return upload
        return f"wandb leet {shlex.quote(str(run_dir / 'wandb'))} shows it here; {upload}"

    def close(self, *, failed: bool = False) -> None:
        """Sends what is left, within FINISH_TIMEOUT seconds, and ends wandb's service. At Python's own end wandb would wait for it
        without a bound.
        """

        def action() -> None:
            import wandb

            try:
                self.run.finish(exit_code=int(failed))
            finally:
                with contextlib.suppress(SystemExit):  # the service's own exit code
                    wandb.teardown()

        self.failed = False  # it may still have rows from before
        self._unless_failed(action, FINISH_TIMEOUT)


def savings(probe: Probe) -> dict[str, Any]:
    """A table and bar charts of one attention layer, forward and backward, for wandb."""
    import wandb

    def bars(unit: str, title: str, value: float, eager: float) -> Any:
        at_least = " (at least)" if unit == "GiB" and probe.eager_is_analytic else ""
        rows = [[probe.backend, value], [f"eager{at_least}", eager]]
        rows = rows[1:] if probe.backend == "eager" else rows
        return wandb.plot.bar(wandb.Table(columns=["attention", unit], data=rows), "attention", unit, title=title)

    memory, eager_memory = probe.bytes / GIB, probe.eager_bytes / GIB
    row: dict[str, Any] = {
        "one layer": str(probe.layer),
        "backend": probe.backend,
        "memory GiB": memory,
        "eager memory GiB": eager_memory,
        "eager was measured": not probe.eager_is_analytic,
        "saved GiB": eager_memory - memory,
        "ratio": eager_memory / memory,
        "time ms": None if probe.seconds is None else probe.seconds * 1e3,
        "eager time ms": None if probe.eager_seconds is None else probe.eager_seconds * 1e3,
        "speed-up": None,
    }
    drawn = {names.ATTENTION_MEMORY_BARS: bars("GiB", "Memory of one attention layer", memory, eager_memory)}
    if probe.seconds is not None and probe.eager_seconds is not None:
        row["speed-up"] = probe.eager_seconds / probe.seconds
        title = "Time of one attention layer, forward and backward"
        drawn[names.ATTENTION_TIME_BARS] = bars("ms", title, probe.seconds * 1e3, probe.eager_seconds * 1e3)
    return {names.ATTENTION_TABLE: wandb.Table(columns=list(row), data=[list(row.values())]), **drawn}
