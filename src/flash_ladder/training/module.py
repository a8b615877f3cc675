"""The GPT as Lightning trains it: one step, one validation, and a stop before a loss that is not finite reaches the weights."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flash_ladder.errors import UserError
from flash_ladder.model.gpt import GPT
from flash_ladder.model.sequence import SharedSequence
from flash_ladder.model_schema import ModelConfig
from flash_ladder.processes import MARGIN_SECONDS
from flash_ladder.schema import OptimizerConfig, TrainerConfig
from flash_ladder.training import metrics
from flash_ladder.training.masters import MasterWeights
from flash_ladder.training.optimizer import build_optimizer, build_schedule, set_values, values_of
from flash_ladder.training.sharding import end_step_with, is_sharded, shard


class NotFinite(UserError):
    """A loss is nan or infinite. Every process sees the mean over all of them, so all raise it at the same step."""


class GPTModule(L.LightningModule):
    """Trains `net`, a GPT, on batches {"tokens": int64 [B, S + 1], and maybe "document_ids": int32 [B, S]}.

    config: a schema.Config as plain dicts (so that weights_only=True reads a checkpoint), with model.vocab_size filled in.
    backend: the attention backend that kernels.choose named.
    """

    def __init__(self, config: dict[str, Any], backend: str) -> None:
        super().__init__()
        self.save_hyperparameters("config", logger=False)
        self.optimizer_config = OptimizerConfig(**config["optimizer"])
        self.trainer_config = TrainerConfig(**config["trainer"])
        self.net = GPT(ModelConfig(**config["model"]), backend=backend)
        self.net.activation_checkpointing = self.trainer_config.activation_checkpointing
        self.net.loss_rows = self.trainer_config.loss_rows
        self.whole_in_step = self.trainer_config.shard == "optimizer"
        self.masters: MasterWeights | None = None
        self.losses = LossWatch()
        self.step_loss = math.nan  # mean loss of the last optimiser step, over its batches and devices
        self.step_lr = math.nan  # learning rate of that step
        self.total_norm: Tensor | None = None  # of that step's gradients, before clipping
        self.val_losses: list[Tensor] = []

    def setup(self, stage: str) -> None:
        """Lightning's hook, once the processes have met: those with successive ranks share their sequences."""
        if self.trainer_config.context_parallel > 1:
            timeout = timedelta(seconds=self.trainer_config.timeout_seconds + MARGIN_SECONDS)
            group, _ = torch.distributed.new_subgroups(self.trainer_config.context_parallel, timeout=timeout)
            self.net.sequence = SharedSequence.over(group)

    def teardown(self, stage: str) -> None:
        """Lightning's hook: what comes after training, such as a sample of text, is one process's own."""
        self.net.sequence = None

    def configure_model(self) -> None:
        """Gives the network its masters, compiles it, and cuts it over the devices where FSDP2 has given a mesh of them."""
        if self.trainer_config.master_weights and self.masters is None:
            self.masters = MasterWeights(self.net)
        if self.device_mesh is None:
            if self.trainer_config.compile:
                self.net.compile()  # in place: torch.compile(self.net) would rename every key of the checkpoint
        elif not is_sharded(self.net):
            mesh = self.device_mesh["data_parallel"]
            shard(self.net, mesh, whole_in_step=self.whole_in_step, compiled=self.trainer_config.compile)

    def on_train_start(self) -> None:
        """After Lightning has restored a checkpoint, values of the optimiser included."""
        set_values(self.trainer.optimizers[0], self.schedule, self.values)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy in nats per token of predicting each token from those before it, float32 scalar.

        Where devices share a sequence, each takes the mean over its own part. The parts are equal, so the mean over all devices,
        of losses and of gradients, is that over all tokens.
        """
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        if self.net.sequence is not None:
            inputs, targets = self.net.sequence.own(inputs), self.net.sequence.own(targets)
        return self.net(inputs, targets, document_ids=batch.get("document_ids"))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ends_step = (batch_idx + 1) % self.trainer_config.accumulate == 0 or self.trainer.is_last_batch
        if self.whole_in_step and is_sharded(self.net):
            end_step_with(self.net, ends_step)
        loss = self.loss(batch)
        self.losses.add(loss.detach(), ends_step)
        return loss

    def on_after_backward(self) -> None:
        if self.masters is not None:
            self.masters.add_gradients()

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """What the optimiser updates: the network's parameters, or their masters."""
        return dict(self.net.named_parameters()) if self.masters is None else self.masters.masters

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises NotFinite where a loss of this step is not finite; the weights are still those of the step before."""
        losses = self.losses.take()
        for loss in losses:
            if not math.isfinite(loss):
                raise NotFinite(
                    f"the training loss is {loss} at step {self.trainer.global_step + 1}; training stopped before that step "
                    f"changed the weights; a smaller optimizer.lr (now {self.optimizer_config.lr:g}) or more warmup_steps may help"
                )
        self.step_loss = sum(losses) / len(losses)
        self.step_lr = optimizer.param_groups[0]["lr"]

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clips the global norm. Lightning's own refuses fused AdamW in bf16 too, though only fp16 has a loss scale to undo."""
        if self.optimizer_config.grad_clip:
            self.total_norm = nn.utils.clip_grad_norm_(self.weights.values(), self.optimizer_config.grad_clip)
        else:
            self.total_norm = nn.utils.get_total_norm([p.grad for p in self.weights.values() if p.grad is not None])

    def grad_norm(self) -> float:
        """The global norm of the last step's gradients, before clipping. Waits for the device; all processes call it together."""
        if self.total_norm is None:
            return math.nan
        return (self.total_norm.full_tensor() if isinstance(self.total_norm, DTensor) else self.total_norm).item()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.val_losses.append(self.loss(batch))

    def on_validation_epoch_end(self) -> None:
        """Logs val/loss and val/perplexity; raises NotFinite where they are not finite, before a checkpoint is written."""
        loss = mean_over_devices(torch.stack(self.val_losses).mean())
        self.val_losses.clear()
        if not loss.isfinite():
            raise NotFinite(
                f"the validation loss is {loss.item()} after step {self.trainer.global_step}; no checkpoint of these weights was "
                f"written; a smaller optimizer.lr (now {self.optimizer_config.lr:g}) may help"
            )
        # For ModelCheckpoint. Lightning itself would send the loss to the loggers under the step before.
        self.log(metrics.VAL_LOSS, loss, logger=False, sync_dist=True)
        for logger in self.trainer.loggers:
            logged = {metrics.VAL_LOSS: loss.item(), metrics.VAL_PERPLEXITY: loss.exp().item()}
            logger.log_metrics(logged, step=self.trainer.global_step)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        # Fused AdamW undoes fp16's loss scaling by itself, which is too late for clipping the gradients.
        scaled = self.trainer.precision == "16-mixed"
        if self.masters is not None:
            self.masters.to(self.device)
        optimizer = build_optimizer(self.weights, self.optimizer_config, fused=not scaled)
        if self.masters is not None:
            optimizer.register_step_post_hook(self.masters.publish)
        self.schedule = build_schedule(optimizer, self.optimizer_config, self.trainer_config.max_steps)
        self.values = values_of(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule, "interval": "step"}}


def mean_over_devices(loss: Tensor) -> Tensor:
    """The mean of `loss` over all processes, without waiting for it; `loss` itself where there is one process."""
    if not torch.distributed.is_initialized():
        return loss
    loss = loss / torch.distributed.get_world_size()
    torch.distributed.all_reduce(loss)
    return loss


class LossWatch:
    """Brings the losses of one optimiser step to the CPU without making the GPU wait.

    Reading a loss (`loss.item()`) waits for all work in flight, and leaves the GPU idle until more work is launched. Here a copy
    into pinned memory and an event follow the step's last forward pass. The host waits for that event alone, and launches the
    optimiser step while the backward pass still runs. The devices' means are taken there too: once a step, because devices wait
    for each other in it.
    """

    def __init__(self) -> None:
        self.waiting: list[Tensor] = []  # losses on the device
        self.host: Tensor | None = None  # those of the step, on the CPU once `copied` has come
        self.copied: torch.cuda.Event | None = None

    def add(self, loss: Tensor, ends_step: bool) -> None:
        """Keeps the float32 scalar `loss`; with the last one of a step starts copying all."""
        self.waiting.append(loss)
        if not ends_step:
            return
        means = mean_over_devices(torch.stack(self.waiting))
        self.waiting = []
        self.host = torch.empty(means.shape, pin_memory=means.is_cuda)
        self.host.copy_(means, non_blocking=True)
        if means.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()

    def take(self) -> list[float]:
        """The mean losses of the step's batches, once they have arrived."""
        if self.copied is not None:
            self.copied.synchronize()
        assert self.host is not None
        return self.host.tolist()
