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
VAL_BEST = "val/best_loss"  # the lowest val/loss of the run, in result.json alone

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
