"""One run, from a checked configuration to a trained model and a report on the screen.

`train` reads top to bottom: decide where and how to run, prepare the data, build the model, measure its attention, train, report.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
import signal
import sys
import textwrap
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf

from flash_ladder.data.batches import TextData
from flash_ladder.data.tokenizer import Tokenizer
from flash_ladder.errors import UserError
from flash_ladder.machine.decide import Place, decide
from flash_ladder.machine.hardware import environment
from flash_ladder.measure.flops import flops_per_token, peak_tflops
from flash_ladder.measure.probe import Layer, probe_attention
from flash_ladder.model.generation import generate
from flash_ladder.model.gpt import GPT
from flash_ladder.model.weights import load_weights
from flash_ladder.schema import Config
from flash_ladder.training import metrics
from flash_ladder.training.callbacks import Bar, Speed, StopOnSignal, Stopped, Work, checkpoints
from flash_ladder.training.checkpoint import AtomicCheckpointIO, load_run
from flash_ladder.training.module import GPTModule, NotFinite
from flash_ladder.training.record import MetricsFile, WandbCopy, open_wandb, peak_memory_gib
from flash_ladder.training.strategy import devices_and_strategy, is_first_process
from flash_ladder.units import GIB

SAMPLE_TOKENS = 200  # of generated text at the end of a run


@rank_zero_only
def say(*words: object) -> None:
    """Prints on the first process."""
    print(*words, flush=True)


def train(cfg: Config, run_dir: Path) -> float | None:
    """Trains what `cfg` asks for and leaves everything in `run_dir`.

    It writes config.yaml, metrics.jsonl, environment.json, tokenizer.json, checkpoints/best.ckpt and last.ckpt, wandb/. With
    cfg.resume, `run_dir` is that run's folder and training goes on from its last checkpoint. Returns the last validation loss, in
    nats per token, on the first process.
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
    trainer = make_trainer(cfg, run_dir, place, loggers, speed)
    try:
        if first:
            probe = probe_attention(attention_layer(cfg, place), place.attention.backend)
            say(f"attention memory: {probe}")
            for logger in loggers:
                logger.log_metrics(metrics.attention_metrics(probe), step=start)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        if first:
            report(run_dir, trainer, data, place, speed, write_sample(module.net, data, place, cfg.prompt, sample_tokens))
            return float(trainer.callback_metrics[metrics.VAL_LOSS])
    except Stopped as stop:
        say(f"stopped by {stop} after step {trainer.global_step}; to go on: python train.py resume={shlex.quote(str(run_dir))}")
        if first:  # elsewhere Lightning would take an exit code other than 0 for a crash and kill this process
            sys.exit(128 + stop.signum)
    except NotFinite:  # raised by all processes together
        if first:
            raise
    except BaseException as error:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)  # the other processes would wait for this one for ever
        if isinstance(error, torch.OutOfMemoryError) and place.device.type == "cuda":
            raise UserError(out_of_memory(cfg, place, trainer)) from error
        raise
    finally:
        for logger in loggers:
            logger.close(failed=sys.exc_info()[0] is not None)
    return None


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


def work(cfg: Config, place: Place, module: GPTModule) -> Work:
    """The work of one optimiser step, and the peak of the devices."""
    peak = peak_tflops(torch.cuda.get_device_name(place.device), place.precision) if place.device.type == "cuda" else None
    return Work(
        tokens=cfg.data.batch_size * cfg.data.seq_len * cfg.trainer.accumulate * place.n_devices,
        flops=flops_per_token(module.net.n_params_matmul, cfg.model.n_layer, cfg.model.d_model, cfg.data.seq_len),
        peak_tflops=None if peak is None else peak * place.n_devices,
    )


# ---- the run's folder and Lightning's trainer ----


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


def make_trainer(cfg: Config, run_dir: Path, place: Place, loggers: list[MetricsFile | WandbCopy], speed: Speed) -> L.Trainer:
    """Lightning's trainer for one endless epoch of trainer.max_steps optimiser steps."""
    bar = [Bar(speed)] if is_first_process() else []
    precision: Any = "32-true" if place.precision == "32" else place.precision  # in Lightning's words
    return L.Trainer(
        **devices_and_strategy(cfg.trainer, place),
        precision=precision,
        max_steps=cfg.trainer.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=cfg.trainer.accumulate,
        val_check_interval=cfg.trainer.val_every * cfg.trainer.accumulate,  # in batches
        check_val_every_n_epoch=None,
        limit_val_batches=cfg.trainer.val_batches,
        num_sanity_val_steps=0,
        deterministic=cfg.trainer.deterministic or None,
        logger=loggers,
        callbacks=[speed, *bar, StopOnSignal(cfg.trainer.log_every), *checkpoints(run_dir / "checkpoints")],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=run_dir,
        use_distributed_sampler=False,  # TextData gives each device its share
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def quiet_lightning() -> None:
    """Keeps Lightning's notes off the screen, and its warnings that do not apply here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for about in (
        ".*does not have many workers.*",  # windows are read from a memory map; data.num_workers adds some
        ".*isinstance.treespec, LeafSpec.*",  # Lightning on a torch newer than itself
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's own
    ):
        warnings.filterwarnings("ignore", about)


# ---- the report at the end ----


@rank_zero_only
def report(run: Path, trainer: L.Trainer, data: TextData, place: Place, speed: Speed, sample: str) -> None:
    """Prints the results of the run."""
    loss, unigram = float(trainer.callback_metrics[metrics.VAL_LOSS]), data.stats.unigram_entropy
    best = cast("ModelCheckpoint", trainer.checkpoint_callback).best_model_score  # the first of `checkpoints`
    memory = "tensors on the GPU" if place.device.type == "cuda" else "resident set of the process"
    rate = speed.tokens_per_second
    folder = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
    lines = {
        "validation": f"loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}",
        "baseline": f"loss {unigram:.4f}, perplexity {math.exp(unigram):.2f} from token frequencies alone (unigram entropy)",
        "sample": textwrap.indent(printable(sample), " " * 13 + "| ", lambda line: True).lstrip(" "),
        "speed": "not measured in a run of one step" if rate is None else in_words(speed.rates(rate)),
        "first step": f"{speed.first_step_seconds:.1f} s after the start",
        "peak memory": f"{peak_memory_gib(place.device):.2f} GiB ({memory})",
        "attention": place.attention,
        "run": f"{folder}: checkpoints/best.ckpt (validation loss {best:.4f}) and last.ckpt, metrics.jsonl, environment.json",
        "next": f"python scripts/export.py run={shlex.quote(str(folder))}",
    }
    print()
    for name, value in lines.items():
        print(f"{name:12} {value}", flush=True)


def printable(text: str) -> str:
    """`text` with control characters, which a terminal would obey, shown as U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def in_words(rates: dict[str, float]) -> str:
    """Speed in one line."""
    line = f"{rates[metrics.TOKENS_PER_SECOND]:,.0f} tokens/s, {rates[metrics.MODEL_TFLOPS]:.3g} TFLOP/s"
    if metrics.MFU in rates:
        line += f", MFU {rates[metrics.MFU]:.1%} (causal: {rates[metrics.MFU_CAUSAL]:.1%})"
    return line


def out_of_memory(cfg: Config, place: Place, trainer: L.Trainer) -> str:
    """The message for a GPU that ran out of memory."""
    total = torch.cuda.get_device_properties(place.device).total_memory / GIB
    return (
        f"{torch.cuda.get_device_name(place.device)} ran out of memory ({total:.0f} GiB) at step {trainer.global_step + 1} with "
        f"attention={place.attention.backend}, data.seq_len={cfg.data.seq_len}, data.batch_size={cfg.data.batch_size}; a smaller "
        f"batch_size with a larger trainer.accumulate, or trainer.activation_checkpointing=true, takes less"
    )


def write_sample(net: GPT, data: TextData, place: Place, prompt: str, n_tokens: int) -> str:
    """Text that the trained network continues `prompt` with, in the training's precision."""
    net = net.to(place.device).eval()  # Lightning leaves it on the CPU
    with torch.autocast(place.device.type, dtype=place.dtype, enabled=place.precision != "32"):
        return generate(net, data.tokenizer, prompt, max_new_tokens=n_tokens)
