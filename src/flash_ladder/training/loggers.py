"""The loggers of a run: metrics.jsonl always, and beside it wandb, CSV or TensorBoard, under the same names and steps."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from flash_ladder.errors import UserError
from flash_ladder.files import replace_files
from flash_ladder.measure.probe import Probe
from flash_ladder.schema import LoggerConfig
from flash_ladder.training.log import warn
from flash_ladder.training.metrics import attention_metrics
from flash_ladder.training.record import MetricsFile
from flash_ladder.training.wandb_copy import WandbCopy, check_wandb, open_wandb


class Copy(Logger):
    """A logger beside metrics.jsonl: where it cannot write, a warning says so once, and the run goes on."""

    failed = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self._unless_it_fails():
            super().log_metrics(dict(metrics), step)  # type: ignore[safe-super]

    def save(self) -> None:
        with self._unless_it_fails():
            super().save()

    def finalize(self, status: str) -> None:
        with self._unless_it_fails():
            super().finalize(status)

    @contextmanager
    def _unless_it_fails(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.failed:
                warn(f"{self.log_dir} cannot be written ({error.strerror}); metrics.jsonl goes on")
            self.failed = True


class CSVCopy(Copy, CSVLogger):  # type: ignore[misc]  # CSVLogger's log_metrics names its types more narrowly than Logger's
    """Lightning's CSV logger."""


class TensorBoardCopy(Copy, TensorBoardLogger):
    """Lightning's TensorBoard logger."""


def check_loggers(cfg: LoggerConfig) -> None:
    """Raises UserError for what `open_loggers` would refuse, before a run has taken any time."""
    if cfg.kind == "wandb":
        check_wandb(cfg)


def open_loggers(cfg: LoggerConfig, run_dir: Path, config: dict[str, Any], step: int = 0) -> list[Logger]:
    """What `cfg` asks for beside metrics.jsonl. `config`: the run's, as plain data.

    step: after which the run goes on; what CSV and TensorBoard have of later ones is dropped, as the run takes them again.
    Raises UserError for a value that wandb refuses, and where a logger cannot write.
    """
    try:
        return _open(cfg, run_dir, config, step)
    except OSError as error:
        raise UserError(f"logger={cfg.kind}: {error.filename or run_dir} cannot be written ({error.strerror})") from None


def _open(cfg: LoggerConfig, run_dir: Path, config: dict[str, Any], step: int) -> list[Logger]:
    beside: Logger | None = None
    if cfg.kind == "wandb":
        beside = open_wandb(cfg, run_dir, config)
    elif cfg.kind == "csv":
        drop_later_rows(run_dir / "csv", step)
        beside = CSVCopy(run_dir, name="csv", flush_logs_every_n_steps=1)
    elif cfg.kind == "tensorboard":
        later: dict[str, Any] = {"purge_step": step + 1} if step else {}
        beside = TensorBoardCopy(run_dir, name="tensorboard", version="", default_hp_metric=False, **later)
    if isinstance(beside, (CSVLogger, TensorBoardLogger)):
        beside.log_hyperparams(config)
    return [] if beside is None else [beside]


def drop_later_rows(folder: Path, step: int) -> None:
    """Drops the rows of later steps from what earlier starts of a run have written for the CSV logger."""
    for path in folder.glob("version_*/metrics.csv"):
        lines = list(csv.reader(path.read_text(encoding="utf-8", errors="replace").splitlines()))
        if not lines or "step" not in lines[0]:
            continue
        of = lines[0].index("step")
        kept = [row for row in lines[1:] if len(row) > of and row[of].isdigit() and int(row[of]) <= step]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([lines[0], *kept])
        replace_files({path: text.getvalue()})


def log_probe(loggers: list[Logger], probe: Probe, step: int) -> None:
    """Logs the figures of one attention layer, and to wandb their pictures."""
    for logger in loggers:
        logger.log_metrics(attention_metrics(probe), step=step)
        if isinstance(logger, WandbCopy):
            logger.log_savings(probe, step)


def log_sample(loggers: list[Logger], prompt: str, text: str, step: int) -> None:
    """Logs what the model of this step wrote."""
    for logger in loggers:
        if isinstance(logger, WandbCopy):
            logger.log_sample(prompt, text, step)


def how_to_look(loggers: list[Logger]) -> str | None:
    """Where to look at a run, or None where metrics.jsonl is all there is."""
    for logger in loggers:
        if isinstance(logger, WandbCopy):
            return logger.how_to_look()
        if isinstance(logger, TensorBoardLogger):
            return f"tensorboard --logdir {logger.root_dir}"
        if isinstance(logger, CSVLogger):
            return f"{logger.log_dir}/metrics.csv"
    return None


def close_loggers(loggers: list[Logger], *, failed: bool) -> None:
    """Closes the loggers of a run that ended, by an error where `failed`."""
    for logger in loggers:
        if isinstance(logger, (MetricsFile, WandbCopy)):
            logger.close(failed=failed)
        else:
            logger.finalize("failed" if failed else "success")
