"""The name of every metric that a run logs, and what it measures. metrics.jsonl, wandb and the closing report use no others.

"All devices" are those of all processes. "One layer" is one attention layer on one device, rank 0's, at the run's shape, forward
and backward. measure/probe.py measures it once before training, beside eager attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash_ladder.measure.flops import attention_flops
from flash_ladder.units import GIB

if TYPE_CHECKING:  # it loads torch, and a sweep reads these names in a process without
    from flash_ladder.measure.probe import Probe

# ---- of an optimiser step ----

TRAIN_LOSS = "train/loss"  # nats per token: mean over the step's batches, all devices
TRAIN_LR = "train/lr"  # the step's learning rate
GRAD_NORM = "train/grad_norm"  # global norm of the step's gradients, all devices' mean, before clipping

# ---- of a validation ----

VAL_LOSS = "val/loss"  # nats per token: mean over the validation's windows, all devices
VAL_PERPLEXITY = "val/perplexity"  # exp(val/loss)
VAL_BEST = "val/best_loss"  # the lowest val/loss so far, that of checkpoints/best.ckpt; in result.json and wandb
VAL_BEST_STEP = "val/best_step"  # the optimiser step of that validation; in wandb alone
VAL_SAMPLE = "val/sample"  # wandb's table: what the trained model wrote

# ---- of the latest steps (speed.WINDOW_SECONDS), validation and checkpoints left out ----

TOKENS_PER_SECOND = "speed/tokens_per_second"  # all devices together
MODEL_TFLOPS = "speed/model_tflops"  # TFLOP/s of the whole model, all devices together, every pair of positions counted
MFU = "speed/mfu"  # speed/model_tflops as a share of all devices' dense peak; absent where the peak is not known
MFU_CAUSAL = "speed/mfu_causal"  # the same, but only the half of attention that a causal model needs is counted
JOULES_PER_TOKEN = "energy/joules_per_token"  # all devices' energy over all devices' tokens; absent where no GPU counts it
WATTS = "energy/watts"  # mean power of all devices together; absent where no GPU counts it

# ---- of the run so far ----

FIRST_STEP_SECONDS = "speed/first_step_seconds"  # from the run's start, imports left out, to the end of its first step; logged once
PEAK_GIB = "memory/peak_gib"  # GiB, the device with most: peak of a GPU's tensors, or on a CPU of the process's resident set
PEAK_SUM_GIB = "memory/peak_sum_gib"  # GiB, the peaks of all devices added up

# ---- of one layer, logged once ----

ATTENTION_GIB = "memory/attention_gib"  # GiB that the chosen backend takes: on a GPU the peak, on a CPU what it keeps for backward
ATTENTION_EAGER_GIB = "memory/attention_eager_gib"  # GiB that eager attention takes
ATTENTION_EAGER_IS_ANALYTIC = (
    "memory/attention_eager_is_analytic"  # 1: eager does not fit, and its GiB are a lower bound; 0: measured
)
ATTENTION_SAVED_GIB = "memory/attention_saved_gib_vs_eager"  # GiB: eager's less the backend's
ATTENTION_SAVED_RATIO = "memory/attention_saved_ratio_vs_eager"  # eager's GiB over the backend's
ATTENTION_SECONDS = "speed/attention_seconds"  # seconds that the chosen backend takes
ATTENTION_EAGER_SECONDS = "speed/attention_eager_seconds"  # seconds that eager attention takes
ATTENTION_TFLOPS = "speed/attention_tflops"  # TFLOP/s of the chosen backend, the causal half counted
ATTENTION_SPEEDUP = "speed/attention_speedup_vs_eager"  # eager's time over the backend's

# What wandb draws of one layer: a table of all its figures, and bars that stand the backend beside eager.
ATTENTION_TABLE = "memory/attention_savings"
ATTENTION_MEMORY_BARS = "memory/attention_bars"  # GiB
ATTENTION_TIME_BARS = "speed/attention_bars"  # ms, forward and backward

# ---- of an exported model, on the validation windows that its folder holds; export and evaluate send them to the run's wandb ----

EVAL_LOSS = "eval/loss"  # nats per token, on the backend that was evaluated
EVAL_AGAINST_LOSS = "eval/against_loss"  # nats per token, on the backend that it was compared with (after export: eager)
EVAL_MEAN_KL = "eval/mean_kl"  # KL divergence between the two, nats per token
EVAL_ROUNDING = "eval/rounding"  # mean KL of rounding alone, from which the limits follow
EVAL_MAX_LOGIT_DIFFERENCE = "eval/max_logit_difference"
EVAL_GREEDY_AGREEMENT = "eval/greedy_agreement"  # share of tokens whose likeliest successor is the same on both
EVAL_WITHIN = "eval/within"  # 1: every figure is within its limit; 0: not
EVAL_TABLE = "eval/parity"  # wandb's table: the same in one row, with the backends, the precision and the device

# ---- of a sweep, in wandb's run of its report ----

SWEEP_TABLE = "sweep/points"  # a row for each point, as in sweep.csv
SWEEP_PICTURES = "sweep/pictures"  # before the name of each picture of the report


def attention_metrics(probe: Probe) -> dict[str, float]:
    """The probe's figures for one layer, under the names above."""
    logged = {
        ATTENTION_GIB: probe.bytes / GIB,
        ATTENTION_EAGER_GIB: probe.eager_bytes / GIB,
        ATTENTION_EAGER_IS_ANALYTIC: float(probe.eager_is_analytic),
        ATTENTION_SAVED_GIB: (probe.eager_bytes - probe.bytes) / GIB,
        ATTENTION_SAVED_RATIO: probe.eager_bytes / probe.bytes,
    }
    if probe.seconds is not None:
        layer = probe.layer
        flops = attention_flops(layer.batch_size, layer.n_head, layer.seq_len, layer.head_dim)
        logged[ATTENTION_SECONDS] = probe.seconds
        logged[ATTENTION_TFLOPS] = flops / probe.seconds / 1e12
        if probe.eager_seconds is not None:
            logged[ATTENTION_EAGER_SECONDS] = probe.eager_seconds
            logged[ATTENTION_SPEEDUP] = probe.eager_seconds / probe.seconds
    return logged
