"""A run that nobody trained, assembled in a second from the parts that export, evaluate and generate read."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import OmegaConf

from flash_ladder.data.batches import TextData
from flash_ladder.export.losses import evaluate
from flash_ladder.kernels import eager
from flash_ladder.kernels.asked import Asked
from flash_ladder.model.gpt import GPT
from flash_ladder.model_schema import ModelConfig
from flash_ladder.schema import Config, DataConfig, TrainerConfig
from flash_ladder.training.checkpoint import AtomicCheckpointIO
from tests.helpers.corpora import documents, write_txt

STEP = 6
VOCAB = 320  # bytes and <|endoftext|>, padded


def sharp_model(**parts: object) -> GPT:
    """A model with weights so large that it matters which key attention looks at."""
    torch.manual_seed(0)
    net = GPT(ModelConfig(**{"n_layer": 2, "n_head": 2, "n_kv_head": 1, "d_model": 32, "vocab_size": VOCAB, **parts}))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3)
    return net.eval()


def made_up_run(folder: Path, *, attention: str = "sdpa", precision: str = "32", gpu: str | None = None, **model: object) -> Path:
    """Writes the files of a run that validated on 12 windows of 32 tokens after STEP steps; returns its folder."""
    net = sharp_model(**model)
    data = DataConfig(
        source="files",
        files=write_txt(folder / "text", documents(20)),
        tokenizer="bytes",
        seq_len=32,
        split_seed=1,
        batch_size=4,
        val_fraction=0.2,
        num_proc=1,
        cache_dir=str(folder / "cache"),
    )
    cfg = Config(model=net.cfg, data=data, trainer=TrainerConfig(max_steps=STEP, val_batches=3))
    text = TextData(data, seed=cfg.seed, val_batches=3)
    text.prepare()
    loss = evaluate(net, text.val_windows(12), backend="sdpa", precision=precision).loss

    run = folder / "run"
    run.mkdir()
    OmegaConf.save(OmegaConf.create(asdict(cfg)), run / "config.yaml")
    text.tokenizer.save(run)
    environment = {
        "gpu": gpu,
        "n_devices": 1,
        "attention": {"backend": attention, "reason": "made up"},
        "precision": {"precision": precision, "reason": "made up"},
        "data": asdict(text.stats),
    }
    (run / "environment.json").write_text(json.dumps(environment))
    lines = [
        {"step": 3, "val/loss": 9.0},
        {"step": STEP, "train/loss": 8.0},
        {"step": STEP, "val/loss": loss},
        {"step": 9, "val/loss": 9.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = {
        "state_dict": {f"net.{name}": w for name, w in net.state_dict().items()},
        "hyper_parameters": {"config": asdict(cfg)},
        "global_step": STEP,
        "optimizer_states": [{"exp_avg": torch.zeros(3)}],
    }
    for name in ("best", "last"):
        AtomicCheckpointIO().save_checkpoint(checkpoint, run / "checkpoints" / f"{name}.ckpt")
    return run


def unscaled(query, key, value, asked):
    """Stands in for a backend's `attend`: attention without its scale."""
    return eager.attend(query, key, value, Asked(1.0, is_causal=True))
