"""What a run says at its end: its report, a sample of text, or that memory ran out."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from flash_ladder.data.batches import LoadingLost, TextData
from flash_ladder.errors import UserError, argument
from flash_ladder.machine.decide import Place
from flash_ladder.model.generation import generate
from flash_ladder.model.gpt import GPT
from flash_ladder.model.loss import perplexity
from flash_ladder.schema import Config
from flash_ladder.training import metrics
from flash_ladder.training.log import say
from flash_ladder.training.result import OutOfMemory, Result
from flash_ladder.units import GIB


@rank_zero_only
def report(cfg: Config, run: Path, result: Result, place: Place, unigram_entropy: float) -> None:
    """Prints what the run came to."""
    came_to, loss = result.metrics, result.metrics[metrics.VAL_LOSS]
    folder = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
    kept = ""  # trainer.checkpoints=false and +trainer.lightning.fast_dev_run keep none
    if metrics.VAL_BEST in came_to and (run / "checkpoints" / "best.ckpt").is_file():
        kept = f"checkpoints/best.ckpt (validation loss {came_to[metrics.VAL_BEST]:.4f}) and last.ckpt, "
    first_step = came_to.get(metrics.FIRST_STEP_SECONDS)
    lines = {
        "validation": f"loss {loss:.4f} nats per token, {perplexity_in_words(loss)}",
        "baseline": f"loss {unigram_entropy:.4f}, {perplexity_in_words(unigram_entropy)} from token frequencies alone "
        "(unigram entropy)",
        "sample": textwrap.indent(printable(result.sample or ""), " " * 13 + "| ", lambda line: True).lstrip(" "),
        "speed": speed_in_words(came_to),
        "first step": "" if first_step is None else f"{first_step:.1f} s after the start",
        "peak memory": memory_in_words(came_to, place),
        "attention": place.attention,
        "run": f"{folder}: {kept}metrics.jsonl, result.json, train.log, environment.json",
        "profile": f"{folder / 'profile'}: trace.json.gz for ui.perfetto.dev, kernels.txt" if cfg.trainer.profile else "",
        "next": f"python scripts/export.py {argument('run', folder)}" if kept else "",
    }
    say()
    for name, value in lines.items():
        if value:
            say(f"{name:12} {value}")


def perplexity_in_words(loss: float) -> str:
    """The perplexity of a loss; with three digits where it is beyond what models have, and inf where it overflows."""
    value = perplexity(loss)
    return f"perplexity {value:.2f}" if value < 1e6 else f"perplexity {value:.3g}"


def printable(text: str) -> str:
    """`text` with control characters, which a terminal would obey, shown as U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def speed_in_words(came_to: dict[str, float]) -> str:
    """Speed and energy in one line."""
    if metrics.TOKENS_PER_SECOND not in came_to:
        return "not measured in a run of one step"
    line = f"{came_to[metrics.TOKENS_PER_SECOND]:,.0f} tokens/s, {came_to[metrics.MODEL_TFLOPS]:.3g} TFLOP/s"
    if metrics.MFU in came_to:
        line += f", MFU {came_to[metrics.MFU]:.1%} (causal: {came_to[metrics.MFU_CAUSAL]:.1%})"
    if metrics.JOULES_PER_TOKEN in came_to:
        line += f", {came_to[metrics.JOULES_PER_TOKEN] * 1e3:.3g} mJ a token ({came_to[metrics.WATTS]:,.0f} W)"
    return line


def memory_in_words(came_to: dict[str, float], place: Place) -> str:
    """Peak memory in one line."""
    if metrics.PEAK_GIB not in came_to:
        return ""
    of = "tensors on the GPU" if place.device.type == "cuda" else "resident set of the process"
    if place.n_devices > 1:
        of += f" with most; {came_to[metrics.PEAK_SUM_GIB]:.2f} GiB on all {place.n_devices} together"
    return f"{came_to[metrics.PEAK_GIB]:.2f} GiB ({of})"


def out_of_memory(cfg: Config, place: Place, step: int) -> OutOfMemory:
    """What to say where a GPU, or this machine, ran out of memory in optimiser step `step`."""
    where = "this machine ran out of memory"
    if place.device.type == "cuda":
        total = torch.cuda.get_device_properties(place.device).total_memory / GIB
        where = f"{torch.cuda.get_device_name(place.device)} ran out of memory ({total:.0f} GiB)"
    return OutOfMemory(
        f"{where} at step {step} with attention={place.attention.backend}, data.seq_len={cfg.data.seq_len}, "
        f"data.batch_size={cfg.data.batch_size}; a smaller batch_size with a larger trainer.accumulate, "
        f"trainer.activation_checkpointing=true, or a larger trainer.context_parallel on more devices takes less"
    )


class ProcessLost(UserError):
    """A process that this run needs died."""

    exit_code = 1


def loading_lost(cfg: Config, step: int, error: LoadingLost) -> ProcessLost:
    """What to say where a loading process died in optimiser step `step`."""
    return ProcessLost(
        f"at step {step} a process that loads batches was gone ({error}); the system kills one where memory runs out: "
        f"data.num_workers={cfg.data.num_workers - 1} takes less, and resume= goes on from the last checkpoint"
    )


def write_sample(net: GPT, data: TextData, place: Place, prompt: str, n_tokens: int) -> str:
    """Text that the trained network continues `prompt` with, in the training's precision."""
    net = net.to(place.device).eval()  # Lightning leaves it on the CPU
    with torch.autocast(place.device.type, dtype=place.dtype, enabled=place.precision != "32"):
        return generate(net, data.tokenizer, prompt, max_new_tokens=n_tokens)
