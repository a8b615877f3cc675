"""What turns gradients into new weights: AdamW or Muon, which weights decay, and the learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from flash_ladder.schema import OptimizerConfig


def build_optimizer(weights: Mapping[str, nn.Parameter], cfg: OptimizerConfig, *, fused: bool) -> torch.optim.Optimizer:
    """The optimiser over a network's weights, which have the names of its parameters; AdamW runs in one kernel where `fused`."""
    if cfg.name == "muon":
        matrices = {name: p for name, p in weights.items() if name.startswith("blocks.") and p.dim() == 2}
        others = [p for name, p in weights.items() if name not in matrices]
        return MuonAndAdamW(list(matrices.values()), weight_decay_groups(others, cfg.weight_decay), cfg, fused=fused)
    groups = weight_decay_groups(weights.values(), cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=fused)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024: https://kellerjordan.github.io/posts/muon/) for matrices and AdamW for the rest, as one optimiser.

    Muon replaces a matrix's momentum by the nearest orthogonal matrix. Its step is scaled to the size that AdamW's has (Liu et al.,
    2025: https://arxiv.org/abs/2502.16982, section 2.2), so one learning rate serves both. Schedules and checkpoints see one list
    of groups and one state, which the two share.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[dict[str, Any]], cfg: OptimizerConfig, *, fused: bool) -> None:
        self.muon = torch.optim.Muon(
            matrices, lr=cfg.lr, weight_decay=cfg.weight_decay, momentum=cfg.momentum, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(others, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=fused)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both, after `closure`, which computes the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A checkpoint that is loaded replaces the groups and the state.
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state
        self.muon.step()
        self.adamw.step()
        return loss


def build_schedule(optimizer: torch.optim.Optimizer, cfg: OptimizerConfig, max_steps: int) -> LambdaLR:
    """The learning rate of every optimiser step, up to `max_steps`."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, cfg, max_steps))


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


def weight_decay_groups(weights: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices and embedding tables decay; norms and biases, which are vectors, do not."""
    weights = list(weights)
    matrices = [p for p in weights if p.dim() >= 2]
    vectors = [p for p in weights if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def lr_factor(step: int, cfg: OptimizerConfig, max_steps: int) -> float:
    """The factor of optimizer.lr at optimiser step `step`, counted from 0.

    It rises in a straight line to 1 at step `warmup_steps`. Then it falls to `min_lr_ratio` at the last step: along half a cosine,
    in a straight line, or in a line over the last `decay_ratio` of the steps (WSD, Hu et al., 2024:
    https://arxiv.org/abs/2404.06395). Or it stays at 1.
    """
    if step < cfg.warmup_steps:
        return (step + 1) / (cfg.warmup_steps + 1)
    falls_from = cfg.warmup_steps
    if cfg.schedule == "wsd":
        falls_from = max(falls_from, max_steps - 1 - round(cfg.decay_ratio * max_steps))
    progress = min(1.0, max(0, step - falls_from) / max(1, max_steps - 1 - falls_from))
    if cfg.schedule == "constant":
        progress = 0.0
    left = 0.5 * (1 + math.cos(math.pi * progress)) if cfg.schedule == "cosine" else 1 - progress
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left
