"""One run, from a checked configuration to a trained model and a report on the screen.

`train` reads top to bottom: decide where and how to run, prepare the data, build the model, measure its attention, train, report.
"""

from __future__ import annotations

import errno
import hashlib
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from flash_ladder.data.batches import LoadingLost, TextData, end_loading
from flash_ladder.data.tokenizer import Tokenizer
from flash_ladder.errors import UserError, argument
from flash_ladder.files import as_json, as_yaml, refuse_taken, refuse_unwritable, replace_files
from flash_ladder.machine.decide import Place, decide
from flash_ladder.machine.hardware import environment
from flash_ladder.measure.probe import Layer, probe_attention
from flash_ladder.model.sequence import heads_of_a_device
from flash_ladder.model.weights import as_safetensors
from flash_ladder.names import FINISHED, STOPPED, WINDOWS
from flash_ladder.schema import Config, with_batch_size
from flash_ladder.training import metrics
from flash_ladder.training.callbacks import Stopped
from flash_ladder.training.extras import extra_arguments, extra_callbacks
from flash_ladder.training.log import run_log, say, warn
from flash_ladder.training.loggers import check_loggers, close_loggers, how_to_look, log_probe, log_sample, open_loggers
from flash_ladder.training.module import GPTModule, NotFinite
from flash_ladder.training.ranks import Ranks
from flash_ladder.training.record import METRICS, MetricsFile, rows_until
from flash_ladder.training.report import loading_lost, out_of_memory, report, write_sample
from flash_ladder.training.result import Result, is_out_of_memory, setting
from flash_ladder.training.resume import Start, check_resume
from flash_ladder.training.sharding import whole
from flash_ladder.training.speed import Speed
from flash_ladder.training.strategy import is_first_process
from flash_ladder.training.trainer import make_trainer, quiet_lightning, work

SAMPLE_TOKENS = 200  # of generated text at the end of a run


def train(cfg: Config, run_dir: Path, notes: Mapping[str, str] = MappingProxyType({})) -> float:
    """Trains what `cfg` asks for, leaves everything in `run_dir`, and returns the last validation loss.

    It writes config.yaml, metrics.jsonl, result.json, train.log, environment.json, tokenizer.json, validation.safetensors,
    checkpoints/best.ckpt and last.ckpt, wandb/, and `notes`, texts by the names of their files. With cfg.resume, `run_dir` is that
    run's folder and training goes on from its last checkpoint. Nothing in it changes before all that may be refused has been looked
    at.
    Raises UserError for a choice that cannot run here, for unreadable data, for a folder that holds another run, for a loss that
    is not finite, where memory runs out, and at the end where metrics.jsonl was removed or could not be written.
    """
    started = time.perf_counter()
    quiet_lightning()
    with run_log() as write_log_to:
        first = is_first_process()
        if first:
            check_loggers(cfg.logger)
        place = decide(cfg)
        cfg = with_batch_size(cfg, place.n_devices)
        say(f"attention: {place.attention}")
        say(f"precision: {place.precision} ({place.precision_reason})")
        arguments = extra_arguments(cfg.trainer.lightning, run_dir)
        callbacks = extra_callbacks(cfg, run_dir)

        data = TextData(
            cfg.data,
            seed=cfg.seed,
            accumulate=cfg.trainer.accumulate,
            val_batches=cfg.trainer.val_batches,
            context_parallel=place.context_parallel,
        )
        data.prepare()
        say(f"data: {describe_data(data)}")
        check_step(cfg, data)
        cfg = replace(cfg, model=replace(cfg.model, vocab_size=vocab_size(cfg, data.tokenizer)))
        sample_tokens = fitting_sample(cfg, data.tokenizer)
        if place.device.type == "cpu":
            cfg.check_cpu_memory()

        torch.manual_seed(cfg.seed)
        module = GPTModule(asdict(cfg), place.attention.backend)
        say(f"model: {module.net.n_params:,} parameters, {cfg.model.n_layer} blocks of width {cfg.model.d_model}")
        start = check_resume(cfg, run_dir, module, data, place.data_parallel) if cfg.resume else Start()

        record: MetricsFile | None = None
        loggers: list[Logger] = []
        look: str | None = None
        of_a_step = work(cfg, place, module)
        if first:
            say_passes(cfg.trainer.max_steps * of_a_step.tokens, data.stats.n_train_tokens)
        speed = Speed(of_a_step, cfg.trainer.log_every, started)
        ranks = Ranks(cfg, place)
        trainer = make_trainer(cfg, run_dir, place, ranks.processes, start, speed=speed, arguments=arguments, callbacks=callbacks)
        result = Result(setting(cfg, place, module.net.n_params, of_a_step.tokens), cfg.trainer.max_steps)

        def close(failed: bool) -> None:
            if record is not None:
                result.step, result.seconds = trainer.global_step, time.perf_counter() - started
                result.metrics = came_to(record, speed, trainer)
                record.close()
                try:
                    result.write(run_dir)
                except UserError as error:
                    record.trouble = str(error)
                    warn(record.trouble)
            close_loggers(loggers, failed=failed)

        def lost(error: UserError) -> None:  # in place of all below, where another process is gone and this one hangs
            result.ended_by(error)
            close(failed=True)

        try:
            if first:
                record, loggers = open_run(cfg, run_dir, place, data, notes, start)
                write_log_to(run_dir / "train.log")
                if not arguments.get("fast_dev_run"):
                    trainer.loggers = loggers
                probe = probe_attention(attention_layer(cfg, place), place.attention.backend)
                say(f"attention memory: {probe}")
                log_probe(loggers, probe, start.step)
            ranks.join(cfg, lost)
            trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint, weights_only=True)
            net = whole(module.net)
            if first:
                result.sample = write_sample(net, data, place, cfg.prompt, sample_tokens)
                log_sample(loggers, cfg.prompt, result.sample, trainer.global_step)
                look = how_to_look(loggers)
            result.status = FINISHED
        except Stopped as stop:
            result.status, result.error = STOPPED, f"stopped by {stop} after step {trainer.global_step}"
            way_on = f"to go on: python train.py {argument('resume', run_dir)}"
            say(f"{result.error}; {way_on if cfg.trainer.checkpoints else 'no checkpoint was kept'}")
            sys.exit(128 + stop.signum)
        except NotFinite as error:  # raised by all processes together
            result.ended_by(error)
            if first:
                raise
        except BaseException as error:
            told = ranks.failed(in_our_words(error, cfg, run_dir, place, trainer.global_step + 1))
            result.ended_by(told)
            if told is not error:
                raise told from error
            raise
        finally:
            close(failed=sys.exc_info()[0] is not None)
            ranks.leave()
            end_loading()
        if result.status == FINISHED:
            report(cfg, run_dir, result, place, data.stats.unigram_entropy)
            if look is not None:
                say(f"{cfg.logger.kind:12} {look}")
        if record is not None and record.trouble is not None:
            raise UserError(record.trouble)
        return result.metrics.get(metrics.VAL_LOSS, math.nan)


def in_our_words(error: BaseException, cfg: Config, run_dir: Path, place: Place, step: int) -> BaseException:
    """What ended optimiser step `step`, as the rest of this program knows it; `error` itself where that is the right word."""
    if is_out_of_memory(error):
        return out_of_memory(cfg, place, step)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{error.filename or run_dir} cannot be written at step {step} ({error.strerror}); make room, then go on")
    if isinstance(error, LoadingLost):
        return loading_lost(cfg, step, error)
    if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):  # Lightning's way with a second Ctrl-C
        return error.__context__
    return error


def came_to(record: MetricsFile, speed: Speed, trainer: L.Trainer) -> dict[str, float]:
    """The run's metrics at its end: the last value of each, but speed and energy of the run less its beginning."""
    found = record.latest | speed.summary()
    validated = trainer.callback_metrics.get(metrics.VAL_LOSS)  # also where +trainer.lightning.fast_dev_run takes the loggers away
    if validated is not None:
        found[metrics.VAL_LOSS] = float(validated)
    best = cast("ModelCheckpoint | None", trainer.checkpoint_callback)  # the first of `checkpoints`
    if best is not None and best.best_model_score is not None:
        found[metrics.VAL_BEST] = float(best.best_model_score)
    return found


# ---- data and model ----


MANY_PASSES = 4  # up to which a repeated text is worth nearly as much as new text (https://arxiv.org/abs/2305.16264)


def say_passes(tokens: int, corpus: int | None) -> None:
    """Says how many times all steps together, which take `tokens`, go through the text; None: the length of a stream is unknown."""
    if corpus is None:
        return
    passes = tokens / corpus
    say(f"steps: {tokens:,} tokens in all, {format(passes, '.2g' if passes < 10 else ',.0f')} passes over the text")
    if passes > MANY_PASSES:
        warn(
            f"{passes:,.0f} passes over one text: beyond {MANY_PASSES}, a model mostly learns it by heart; fewer trainer.max_steps "
            f"or a longer text (data=hub, data=text) would teach it more"
        )


def describe_data(data: TextData) -> str:
    """One line about the corpus and what a model has to beat."""
    stats = data.stats
    documents = "a stream" if stats.n_documents is None else f"{stats.n_documents:,} document{'s' * (stats.n_documents != 1)}"
    size = "" if stats.n_bytes is None else f", {stats.n_bytes / 1e6:.1f} MB"
    tokens = "" if stats.n_train_tokens is None else f"{stats.n_train_tokens:,} tokens to train on, "
    return f"{documents}{size}: {tokens}{stats.n_val_tokens:,} held out ({stats.split}); vocabulary {data.tokenizer.vocab_size:,}"


def check_step(cfg: Config, data: TextData) -> None:
    """Raises UserError for an optimiser step of more batches than the text has windows: each would be seen again and again."""
    n_windows = None if data.stats.n_train_tokens is None else data.stats.n_train_tokens // cfg.data.seq_len
    if n_windows is not None and cfg.trainer.accumulate > n_windows:
        raise UserError(
            f"trainer.accumulate={cfg.trainer.accumulate}: a step would have more batches than the text has windows, and see each "
            f"many times; {n_windows} (of data.seq_len={cfg.data.seq_len}) is the most"
        )


def vocab_size(cfg: Config, tokenizer: Tokenizer) -> int:
    """The model's vocabulary size: as configured, or the tokenizer's rounded up to 64, which suits tensor cores."""
    if cfg.model.vocab_size is None:
        return math.ceil(tokenizer.vocab_size / 64) * 64
    if cfg.model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={cfg.model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            f"model.vocab_size=null takes the tokenizer's, rounded up to 64"
        )
    return cfg.model.vocab_size


def fitting_sample(cfg: Config, tokenizer: Tokenizer) -> int:
    """How many tokens the closing sample may have, so that it fits in a context of the training's length."""
    prompt = max(1, len(tokenizer.encode(cfg.prompt)))
    if prompt > cfg.data.seq_len:
        raise UserError(f"prompt: {prompt} tokens are more than data.seq_len={cfg.data.seq_len}; a shorter one would work")
    return min(SAMPLE_TOKENS, cfg.data.seq_len - prompt)


def attention_layer(cfg: Config, place: Place) -> Layer:
    """One attention layer of the run, for the probe to measure: the heads of one device, at all positions."""
    n_head, n_kv_head = heads_of_a_device(cfg.model.n_head, cfg.model.n_kv_head, place.context_parallel)
    return Layer(
        batch_size=cfg.data.batch_size,
        n_head=n_head,
        n_kv_head=n_kv_head,
        seq_len=cfg.data.seq_len,
        head_dim=cfg.model.head_dim,
        dtype=place.dtype,
        device=place.device,
        document_ids=cfg.data.document_ids,
        window_size=cfg.model.window_of(0),
        softcap=cfg.model.softcap,
        alibi=cfg.model.position == "alibi",
    )


# ---- the run's folder ----


def open_run(
    cfg: Config, run_dir: Path, place: Place, data: TextData, notes: Mapping[str, str], start: Start
) -> tuple[MetricsFile, list[Logger]]:
    """Writes `notes`, config.yaml, tokenizer.json, the validation windows and environment.json, all of them or none.

    Returns the run's record, and all loggers, that one included. What a resumed run has recorded after its checkpoint is dropped.
    """
    config = asdict(cfg)
    about = environment(
        place.device,
        n_devices=place.n_devices,
        attention=asdict(place.attention),
        precision={"precision": place.precision, "reason": place.precision_reason},
        data=asdict(data.stats),
    )
    contents: dict[str, str | bytes] = {**notes, "config.yaml": as_yaml(config), "tokenizer.json": data.tokenizer.to_json()}
    if cfg.trainer.checkpoints:  # export evaluates on these windows, also where the text has changed or is gone
        windows = data.val_windows(data.validated(place.data_parallel)[0])
        contents[WINDOWS] = packed = as_safetensors({name: rows.int() for name, rows in windows.items()})
        about["data"]["windows_sha256"] = hashlib.sha256(packed).hexdigest()
    contents["environment.json"] = as_json(about)
    files = {run_dir / name: content for name, content in contents.items()}

    def write(more: Mapping[Path, str | bytes]) -> None:
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
        replace_files({path: content for path, content in files.items() if not path.exists()} | dict(more))

    if not cfg.resume:
        refuse_taken(run_dir)
    kept = rows_until(run_dir / METRICS, start.step) if cfg.resume else ""
    try:
        refuse_unwritable(run_dir / "train.log")
        write({**files, run_dir / METRICS: kept})
        (run_dir / "result.json").unlink(missing_ok=True)  # of an earlier start
        record = MetricsFile(run_dir / METRICS, restore=lambda: write({}))
    except OSError as error:
        raise UserError(
            f"{error.filename or run_dir} cannot be written ({error.strerror}); nothing was changed; make it possible and try again"
        ) from None
    return record, [record, *open_loggers(cfg.logger, run_dir, as_run(config, place) | {"environment": about}, start.step)]


def as_run(config: dict[str, Any], place: Place) -> dict[str, Any]:
    """The configuration with what `auto` came to on this machine, for loggers to show and to group by."""
    chosen = {"backend": place.attention.backend, "reason": place.attention.reason}
    return {
        **config,
        "attention": chosen | {"asked": config["attention"]["backend"]},
        "trainer": {**config["trainer"], "precision": place.precision, "devices": place.n_devices},
    }
