"""A run small enough to train inside a test: bytes of a made-up text, one block of width 32."""

import json
from dataclasses import replace
from pathlib import Path

from flash_ladder.model_schema import ModelConfig
from flash_ladder.schema import Config, DataConfig, LoggerConfig, OptimizerConfig, TrainerConfig

LINES = [f"def f{i}(x):\n    return x + {i}\n\n" for i in range(40)]


def tiny_config(folder: Path, **trainer: object) -> Config:
    """A run of 6 steps on 24 small files, which it writes to `folder`; keywords replace values of its TrainerConfig."""
    text = folder / "text"
    if not text.exists():
        text.mkdir(parents=True)
        for i in range(24):
            (text / f"{i:02}.txt").write_text("".join(LINES[i : i + 8]))
    return Config(
        model=ModelConfig(n_layer=1, n_head=2, n_kv_head=1, d_model=32),
        data=DataConfig(
            source="files",
            files=str(text / "*.txt"),
            tokenizer="bytes",
            seq_len=16,
            batch_size=2,
            val_fraction=0.2,
            num_proc=1,
            cache_dir=str(folder / "cache"),
        ),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0, min_lr_ratio=1.0),  # a schedule that does not depend on max_steps
        trainer=replace(TrainerConfig(max_steps=6, accelerator="cpu", val_every=3, val_batches=2, log_every=1), **trainer),
        logger=LoggerConfig(mode="disabled"),
    )


def overrides(cfg: Config) -> list[str]:
    """The command line that makes train.py compose `cfg` (a tiny_config)."""
    groups = {"model": cfg.model, "data": cfg.data, "optimizer": cfg.optimizer, "trainer": cfg.trainer, "logger": cfg.logger}
    keys = [f"{group}.{key}={'null' if v is None else v}" for group, part in groups.items() for key, v in vars(part).items()]
    return ["data=text", *keys]


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def values(run: Path, name: str) -> dict[int, float]:
    """One metric of a run, by step."""
    return {line["step"]: line[name] for line in metrics(run) if name in line}
