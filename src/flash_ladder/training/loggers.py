"""The loggers of a run: metrics.jsonl always, and beside it wandb, CSV or TensorBoard, under the same names and steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from flash_ladder.measure.probe import Probe
from flash_ladder.schema import LoggerConfig
from flash_ladder.training.metrics import attention_metrics
from flash_ladder.training.record import MetricsFile
from flash_ladder.training.wandb_copy import WandbCopy, check_wandb, open_wandb


def check_loggers(cfg: LoggerConfig) -> None:
    """Raises UserError for what `open_loggers` would refuse, before a run has taken any time."""
    if cfg.kind == "wandb":
        check_wandb(cfg)


def open_loggers(cfg: LoggerConfig, run_dir: Path, config: dict[str, Any]) -> tuple[MetricsFile, list[Logger]]:
    """The run's metrics.jsonl, and all its loggers: that one and what `cfg` asks for. `config`: the run's, as plain data.

    Raises UserError for a value that wandb refuses.
    """
    beside: Logger | None = None
    if cfg.kind == "wandb":
        beside = open_wandb(cfg, run_dir, config)
    elif cfg.kind == "csv":
        beside = CSVLogger(run_dir, name="csv", flush_logs_every_n_steps=1)
    elif cfg.kind == "tensorboard":
        beside = TensorBoardLogger(run_dir, name="tensorboard", version="", default_hp_metric=False)
    if isinstance(beside, (CSVLogger, TensorBoardLogger)):
        beside.log_hyperparams(config)
    record = MetricsFile(run_dir / "metrics.jsonl")
    return record, [record, *([] if beside is None else [beside])]


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
