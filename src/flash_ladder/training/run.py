"""One run, from a checked configuration to a trained model and a report on the screen.

`train` reads top to bottom: decide where and how to run, prepare the data, build the model, measure its attention, train, report.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf

from flash_ladder.data.batches import TextData
from flash_ladder.data.tokenizer import Tokenizer
from flash_ladder.errors import UserError
from flash_ladder.machine.decide import Place, decide
from flash_ladder.machine.hardware import environment
from flash_ladder.measure.probe import Layer, probe_attention
from flash_ladder.model.weights import load_weights
from flash_ladder.schema import Config
from flash_ladder.training import metrics
from flash_ladder.training.callbacks import Speed, Stopped
from flash_ladder.training.checkpoint import load_run
from flash_ladder.training.module import GPTModule, NotFinite
from flash_ladder.training.ranks import Ranks
from flash_ladder.training.record import MetricsFile, WandbCopy, open_wandb
from flash_ladder.training.report import out_of_memory, report, say, write_sample
from flash_ladder.training.sharding import whole
from flash_ladder.training.strategy import is_first_process
from flash_ladder.training.trainer import make_trainer, quiet_lightning, work

SAMPLE_TOKENS = 200  # of generated text at the end of a run


def train(cfg: Config, run_dir: Path) -> None:
    """Trains what `cfg` asks for and leaves everything in `run_dir`.

    It writes config.yaml, metrics.jsonl, environment.json, tokenizer.json, checkpoints/best.ckpt and last.ckpt, wandb/. With
    cfg.resume, `run_dir` is that run's folder and training goes on from its last checkpoint.
    Raises UserError for a choice that cannot run here, for unreadable data and for a loss that is not finite.
    """
    quiet_lightning()
    first = is_first_process()
    place = decide(cfg)
    say(f"attention: {place.attention}")
    say(f"precision: {place.precision} ({place.precision_reason})")

    data = TextData(cfg.data, seed=cfg.seed, accumulate=cfg.trainer.accumulate, val_batches=cfg.trainer.val_batches)
    data.prepare()
    say(f"data: {describe_data(data)}")
    cfg = replace(cfg, model=replace(cfg.model, vocab_size=vocab_size(cfg, data.tokenizer)))
    sample_tokens = fitting_sample(cfg, data.tokenizer)

    torch.manual_seed(cfg.seed)
    module = GPTModule(asdict(cfg), place.attention.backend)
    say(f"model: {module.net.n_params:,} parameters, {cfg.model.n_layer} blocks of width {cfg.model.d_model}")
    checkpoint, start = check_resume(cfg, run_dir, module, data.tokenizer) if cfg.resume else (None, 0)

    loggers = open_run(cfg, run_dir, place, data) if first else []
    speed = Speed(work(cfg, place, module), cfg.trainer.log_every)
    ranks = Ranks(cfg, place)
    trainer = make_trainer(cfg, run_dir, place, loggers, speed, ranks.processes)
    try:
        if first:
            probe = probe_attention(attention_layer(cfg, place), place.attention.backend)
            say(f"attention memory: {probe}")
            for logger in loggers:
                logger.log_metrics(metrics.attention_metrics(probe), step=start)
        ranks.join(cfg)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        net = whole(module.net)
        if first:
            report(run_dir, trainer, data, place, speed, write_sample(net, data, place, cfg.prompt, sample_tokens))
    except Stopped as stop:
        say(f"stopped by {stop} after step {trainer.global_step}; to go on: python train.py resume={shlex.quote(str(run_dir))}")
        sys.exit(128 + stop.signum)
    except NotFinite:  # raised by all processes together
        if first:
            raise
    except BaseException as error:
        reason = ranks.failed(error)
        if reason is not error:
            raise reason from error
        if isinstance(error, torch.OutOfMemoryError) and place.device.type == "cuda":
            raise UserError(out_of_memory(cfg, place, trainer)) from error
        raise
    finally:
        for logger in loggers:
            logger.close(failed=sys.exc_info()[0] is not None)
        ranks.leave()


# ---- data and model ----


def describe_data(data: TextData) -> str:
    """One line about the corpus and what a model has to beat."""
    stats = data.stats
    documents = "a stream" if stats.n_documents is None else f"{stats.n_documents:,} document{'s' * (stats.n_documents != 1)}"
    size = "" if stats.n_bytes is None else f", {stats.n_bytes / 1e6:.1f} MB"
    tokens = "" if stats.n_train_tokens is None else f"{stats.n_train_tokens:,} tokens to train on, "
    return f"{documents}{size}: {tokens}{stats.n_val_tokens:,} held out ({stats.split}); vocabulary {data.tokenizer.vocab_size:,}"


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


def check_resume(cfg: Config, run_dir: Path, module: GPTModule, tokenizer: Tokenizer) -> tuple[Path, int]:
    """The checkpoint to resume from, and its step. Raises UserError where it is missing, damaged, another model's or complete."""
    saved, weights, info = load_run(run_dir, "last")
    for name, value in asdict(cfg.model).items():
        if saved["model"].get(name) != value:
            raise UserError(
                f"resume={cfg.resume} was trained with model.{name}={saved['model'].get(name)}, not {value}; start a new run"
            )
    load_weights(module.net, weights, info["checkpoint"])
    if Tokenizer.load(run_dir).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"resume={cfg.resume}: its corpus has changed and with it the tokenizer, so its model would not fit; start a new run"
        )
    if info["step"] >= cfg.trainer.max_steps:
        raise UserError(
            f"resume={cfg.resume} is at step {info['step']} of trainer.max_steps={cfg.trainer.max_steps}: nothing is left to do; "
            f"trainer.max_steps={2 * info['step']} would train as long again"
        )
    say(f"resuming after step {info['step']}")
    return Path(info["checkpoint"]), info["step"]


def attention_layer(cfg: Config, place: Place) -> Layer:
    """One attention layer of the run, for the probe to measure."""
    return Layer(
        batch_size=cfg.data.batch_size,
        n_head=cfg.model.n_head,
        n_kv_head=cfg.model.n_kv_head,
        seq_len=cfg.data.seq_len,
        head_dim=cfg.model.head_dim,
        dtype=place.dtype,
        device=place.device,
        document_ids=cfg.data.document_ids,
    )


# ---- the run's folder ----


def open_run(cfg: Config, run_dir: Path, place: Place, data: TextData) -> list[MetricsFile | WandbCopy]:
    """Writes config.yaml, tokenizer.json and environment.json, and opens the loggers."""
    config = asdict(cfg)
    about = environment(
        place.device,
        n_devices=place.n_devices,
        attention=asdict(place.attention),
        precision={"precision": place.precision, "reason": place.precision_reason},
        data=asdict(data.stats),
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(config), run_dir / "config.yaml")
    (run_dir / "environment.json").write_text(json.dumps(about, indent=2) + "\n")
    data.tokenizer.save(run_dir)
    run = open_wandb(cfg.logger, run_dir, config | {"environment": about})
    return [MetricsFile(run_dir / "metrics.jsonl"), *([] if run is None else [WandbCopy(run)])]
