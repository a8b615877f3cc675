"""What export and evaluate found, sent into wandb's copy of the run that the model comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flash_ladder.errors import UserError
from flash_ladder.export.losses import Evaluation
from flash_ladder.export.parity import Check, Parity
from flash_ladder.training import metrics
from flash_ladder.training.wandb_copy import continue_wandb, recorded_run

REMEMBERED = ("id", "project", "entity")  # what config.json of an exported model keeps of its run's wandb


def wandb_of(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What wandb knows a run by, empty for a run without wandb. `config`: the run's, as plain dicts."""
    known = recorded_run(run)
    return config.get("logger", {}) | known if known else {}


def wandb_of_export(folder: Path, config: dict[str, Any], asked: str) -> tuple[Path, dict[str, Any]] | None:
    """Where to log the evaluation of an exported model, and into which run; None: nowhere.

    asked: auto (where the export still lies in its run's folder: there, as that run did), offline or online (else: in this
    folder), or disabled. Raises UserError where logging was asked for and the run had no wandb.
    """
    remembered = config.get("wandb", {})
    run = folder.resolve().parent
    if remembered and recorded_run(run).get("id") == remembered["id"]:
        return run, recorded_run(run)
    if asked == "auto":
        return None
    if not remembered:
        raise UserError(f"wandb={asked}: the run that model={folder} comes from had no wandb, so there is no run to log into")
    return Path.cwd(), remembered


def log_evaluation(
    folder: Path,
    about: dict[str, Any],
    asked: str,
    evaluation: Evaluation,
    parity: Parity | None,
    checks: list[Check],
    where: str,
    step: int,
) -> None:
    """Logs the figures of one evaluation into the run `about`, in `folder`/wandb, and prints where to look at them.

    asked: offline, online or disabled; auto: as WANDB_MODE says, or else as the run did. where: the device in words.
    step: the optimiser step of the checkpoint.
    """
    copy = continue_wandb(folder, about, None if asked == "auto" else asked)
    if copy is None:
        return
    figures = evaluation_metrics(evaluation, parity, checks)
    row = {
        "backend": evaluation.backend,
        "against": None if parity is None else parity.against.backend,
        "precision": evaluation.precision,
        "device": where,
        "tokens": evaluation.n_tokens,
        **{name.partition("/")[2]: value for name, value in figures.items()},
    }
    copy.log_evaluation(row, figures, step)
    print(f"wandb: {copy.how_to_look()}")
    copy.close()


def evaluation_metrics(evaluation: Evaluation, parity: Parity | None, checks: list[Check]) -> dict[str, float]:
    """An evaluation under the names that metrics.py gives it."""
    figures = {metrics.EVAL_LOSS: evaluation.loss, metrics.EVAL_WITHIN: float(all(check.within for check in checks))}
    if parity is not None:
        figures |= {
            metrics.EVAL_AGAINST_LOSS: parity.against.loss,
            metrics.EVAL_MEAN_KL: parity.mean_kl,
            metrics.EVAL_ROUNDING: parity.rounding,
            metrics.EVAL_MAX_LOGIT_DIFFERENCE: parity.max_logit_difference,
            metrics.EVAL_GREEDY_AGREEMENT: parity.greedy_agreement,
        }
    return figures
