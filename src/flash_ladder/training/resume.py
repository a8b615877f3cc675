"""Going on from a run's last checkpoint: what is refused, and where training begins again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from flash_ladder.data.batches import TextData
from flash_ladder.data.tokenizer import Tokenizer
from flash_ladder.errors import UserError
from flash_ladder.files import read_json
from flash_ladder.model.weights import load_weights
from flash_ladder.model_schema import ModelConfig
from flash_ladder.names import FINISHED
from flash_ladder.schema import Config
from flash_ladder.training.checkpoint import load_to_go_on
from flash_ladder.training.log import say
from flash_ladder.training.module import GPTModule


@dataclass(frozen=True)
class Start:
    """Where training begins."""

    checkpoint: Path | None = None
    step: int = 0  # the optimiser steps behind it
    owes_validation: bool = False  # of the weights of that step


def check_resume(cfg: Config, run_dir: Path, module: GPTModule, data: TextData, readers: int) -> Start:
    """Where to go on, with so many readers of the text: the devices, or the groups of them that share their sequences.

    Raises UserError where the checkpoint is missing, damaged or another model's, and where the run finished.
    """
    saved, weights, info = load_to_go_on(run_dir)
    trained = asdict(ModelConfig(**saved["model"]))  # an earlier version's has fewer keys
    for name, value in asdict(cfg.model).items():
        if trained[name] != value:
            raise UserError(f"resume={cfg.resume} was trained with model.{name}={trained[name]}, not {value}; start a new run")
    optimizer = saved["optimizer"].get("name", "adamw")
    if optimizer != cfg.optimizer.name:
        raise UserError(
            f"resume={cfg.resume} was trained with optimizer.name={optimizer}, whose state {cfg.optimizer.name} cannot go on from; "
            f"start a new run"
        )
    load_weights(module.net, weights, info["checkpoint"])
    check_same_text(cfg, run_dir, saved, data)
    step, last = info["step"], cfg.trainer.max_steps
    if step > last or (step == last and has_finished(run_dir, step)):
        raise UserError(
            f"resume={cfg.resume} is at step {step} of trainer.max_steps={last}: nothing is left to do; "
            f"trainer.max_steps={2 * step} would train as long again"
        )
    say(f"resuming after step {step}")
    stream = (info["text"] or {}).get("stream")
    if cfg.data.streaming and step and not (stream and data.fits_stream(stream, readers)):
        say(
            f"the stream is read from its beginning, because {info['checkpoint']} has no place in it for {readers} "
            f"device{'s' * (readers != 1)} and seed={cfg.seed}: some text of this pass is read twice, some not at all"
        )
    if saved["data"]["seq_len"] != cfg.data.seq_len and not cfg.data.streaming:
        say(
            f"data.seq_len is {cfg.data.seq_len} and was {saved['data']['seq_len']}: the windows are cut and shuffled anew, and "
            f"some text of this pass is read twice, some not at all"
        )
    is_due = step % cfg.trainer.val_every == 0 or step == last
    return Start(Path(info["checkpoint"]), step, owes_validation=is_due and info["val_loss"] is None)


def check_same_text(cfg: Config, run_dir: Path, saved: dict[str, Any], data: TextData) -> None:
    """Raises UserError where a resumed run would hold out other text than before, and validate on what it was trained on."""
    before = {"seed": saved["seed"], **{f"data.{key}": value for key, value in saved["data"].items()}}
    now = {"seed": cfg.seed, **{f"data.{key}": value for key, value in asdict(cfg.data).items()}}
    drawn_by = ("data.split_seed", *([] if cfg.data.streaming else ["data.val_fraction"]))
    for key in (*drawn_by, *(["seed"] if cfg.data.split_seed is None else [])):
        if before[key] != now[key]:
            raise UserError(
                f"resume={cfg.resume} held out text by {key}={before[key]}, and with {now[key]} it would validate on what it was "
                f"trained on; {key}={before[key]} goes on, or start a new run"
            )
    about = read_json(run_dir / "environment.json")
    trained_on = about["data"].get("corpus") if isinstance(about, dict) and isinstance(about.get("data"), dict) else None
    if trained_on != data.stats.corpus or Tokenizer.load(run_dir).fingerprint != data.tokenizer.fingerprint:
        raise UserError(
            f"resume={cfg.resume}: its corpus has changed, or what the tokenizer is made of, so it would validate on what it was "
            f"trained on; start a new run"
        )


def has_finished(run_dir: Path, step: int) -> bool:
    """Whether the run came to its report after this step."""
    try:
        result = read_json(run_dir / "result.json")
    except UserError:
        return False
    return isinstance(result, dict) and (result.get("status"), result.get("step")) == (FINISHED, step)


class BetweenSteps(Callback):
    """Lets a resumed run begin between two optimiser steps, whatever was going on when its checkpoint was written.

    An error may have ended the run inside an accumulation window or a validation; the weights are those of the last whole step all
    the same. So the count of batches is set to that step's, in windows of the present trainer.accumulate, and a validation that the
    step is due and lacks is made first, from its beginning.
    """

    def __init__(self, start: Start, max_steps: int) -> None:
        self.start, self.max_steps = start, max_steps

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        loops = checkpoint["loops"]["fit_loop"]
        batches, validation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
        if batches["current"] != batches["total"]:
            return  # not one endless pass (+trainer.lightning.limit_train_batches)
        _set(batches, self.start.step * trainer.accumulate_grad_batches)
        _set(validation, 0)
        is_due = batches["current"]["ready"] % trainer.val_check_interval == 0  # then Lightning counts the step once more
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = self.start.step - is_due
        if self.start.owes_validation:  # one that was begun and broke off in its first batch
            validation["total"].update(ready=1, started=1)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step >= self.max_steps:
            trainer.should_stop = True  # the validation was all that was left to do


def _set(progress: dict[str, Any], count: int) -> None:
    """Sets how many batches one of Lightning's loops has begun and ended."""
    for counts in (progress["total"], progress["current"]):
        counts.update(dict.fromkeys(counts, count))
