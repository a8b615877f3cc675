"""What a run says on the screen: its lines as it goes, and the report at its end."""

from __future__ import annotations

import math
import shlex
import textwrap
from pathlib import Path
from typing import cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from flash_ladder.data.batches import TextData
from flash_ladder.machine.decide import Place
from flash_ladder.model.generation import generate
from flash_ladder.model.gpt import GPT
from flash_ladder.schema import Config
from flash_ladder.training import metrics
from flash_ladder.training.callbacks import Speed
from flash_ladder.training.record import peak_memory_gib
from flash_ladder.units import GIB


@rank_zero_only
def say(*words: object) -> None:
    """Prints on the first process."""
    print(*words, flush=True)


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
