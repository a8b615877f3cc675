"""What turns gradients into new weights: AdamW, which weights decay, and the learning rate over the steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from flash_ladder.schema import OptimizerConfig


def build_optimizer(net: nn.Module, cfg: OptimizerConfig, *, fused: bool) -> torch.optim.Optimizer:
    """AdamW over the parameters of `net`, in one kernel where it is `fused`."""
    groups = weight_decay_groups(net, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=fused)


def build_schedule(optimizer: torch.optim.Optimizer, cfg: OptimizerConfig, max_steps: int) -> LambdaLR:
    """The learning rate of every optimiser step: linear warm-up, then a cosine decay that ends at step `max_steps`."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, cfg.warmup_steps, max_steps, cfg.min_lr_ratio))


def values_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What every parameter group is set to (lr, weight_decay, betas, ...), without its parameters."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def set_values(optimizer: torch.optim.Optimizer, schedule: LambdaLR, values: list[dict[str, Any]]) -> None:
    """Sets every group to `values` (values_of) once a checkpoint is restored, and its learning rate to that of the present step.

    A checkpoint holds the values as well as the state. The run's configuration decides over them, also for the first step.
    """
    for group, value, factor in zip(optimizer.param_groups, values, schedule.lr_lambdas, strict=True):
        group.update(value)
        group["lr"] = value["initial_lr"] * factor(schedule.last_epoch)
    schedule.base_lrs = [value["initial_lr"] for value in values]


def weight_decay_groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices and embedding tables decay; norms and biases, which are vectors, do not."""
    matrices = [p for p in net.parameters() if p.dim() >= 2]
    vectors = [p for p in net.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def lr_factor(step: int, warmup_steps: int, max_steps: int, min_lr_ratio: float) -> float:
    """The factor of optimizer.lr at optimiser step `step`, counted from 0.

    Rises in a straight line to 1 at step `warmup_steps`, then falls along half a cosine to `min_lr_ratio` at the last step.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
