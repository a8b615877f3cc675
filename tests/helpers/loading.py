"""Batches of a TextData, by hand and under Lightning."""

from pathlib import Path
from types import SimpleNamespace

import lightning
import torch

from flash_ladder.data.batches import TextData


def first_batches(loader, n: int) -> torch.Tensor:
    """[n, B, seq_len + 1]"""
    return torch.stack([batch["tokens"] for batch, _ in zip(loader, range(n), strict=False)])


def as_rank(data: TextData, rank: int, world_size: int, global_step: int = 0) -> TextData:
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, global_step=global_step)
    return data


class Recorder(lightning.LightningModule):
    """Trains one number and remembers every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch: dict) -> torch.Tensor:
        self.seen.append(batch["tokens"].tolist())
        return self.weight * 1.0

    def validation_step(self, batch: dict) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path: Path, data: TextData, steps: int, resume: str | None = None) -> tuple[list, str]:
    """The batches that training until `steps` sees, and a checkpoint at its end."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=data.accumulate,
        val_check_interval=2 * data.accumulate,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        **quiet,
    )
    recorder = Recorder()
    trainer.fit(recorder, datamodule=data, ckpt_path=resume)
    trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
    return recorder.seen, str(tmp_path / f"{steps}.ckpt")
