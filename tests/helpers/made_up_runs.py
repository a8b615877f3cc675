"""Folders of runs that nobody trained: a sweep over backends and lengths as its launcher and its runs leave it."""

import json
from pathlib import Path

from flash_ladder.units import GIB

BACKENDS = ("flash_v2", "eager", "sdpa")  # not in the ladder's order
LENGTHS = (4096, 1024, 8192, 2048)
TOKENS = 16384  # of a step
FASTER = {"eager": 1.0, "sdpa": 2.0, "flash_v2": 3.0}  # than eager, at 1024 tokens; a doubling adds as much


def layer_gib(backend: str, seq_len: int) -> float:
    """One layer's memory of one sequence: the square of the length for eager, else its first power."""
    return (seq_len**2 * 64 if backend == "eager" else seq_len * 8192) / GIB


def write_run(folder: Path, *, setting: dict, measured: dict, status: str = "finished", error: str | None = None, **more) -> Path:
    """A run's folder: result.json, config.yaml, environment.json, metrics.jsonl and Hydra's overrides (`overrides`)."""
    (folder / ".hydra").mkdir(parents=True)
    keys = ("seq_len", "batch_size")
    lines = [f"attention:\n  backend: {setting['backend']}", "data:", *(f"  {k}: {setting[k]}" for k in keys if k in setting)]
    (folder / "config.yaml").write_text("\n".join([*lines, "trainer:", "  max_steps: 4", ""]))
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- '{o}'\n" for o in more.get("overrides", ())))
    end = loss if isinstance(loss := measured.get("val/loss"), float) else 4.0
    curve = [{"step": step, "time": 100.0 + step, "train/loss": end + 4 / step - 1} for step in range(1, 5)]
    curve.append({"step": 4, "time": 105.0, "val/loss": measured.get("val/loss")})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    about = {
        "gpu": setting.get("gpu"),
        "started": "2026-11-30T04:00:00+0000",
        "command": ["python", "train.py", *more.get("overrides", ())],
        "versions": {"torch": "2.13.0", "triton": "3.6.0", "python": "3.11.7"},
    }
    (folder / "environment.json").write_text(json.dumps(about))
    result = {"status": status, "error": error, "step": 4, "max_steps": 4, "seconds": 12.5}
    result |= {"setting": setting, "metrics": measured, "sample": None}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def made_up_sweep(folder: Path, backends=BACKENDS, lengths=LENGTHS, gpu: str | None = "NVIDIA H200") -> Path:
    """Backends by lengths on one GPU; eager runs out of memory at 8192, and the last point waits and has no folder."""
    points = []
    for backend in backends:
        for seq_len in lengths:
            number, batch = len(points), TOKENS // seq_len
            lost = backend == "eager" and seq_len == 8192
            gib, eager = layer_gib(backend, seq_len), layer_gib("eager", seq_len)
            faster = 1 + (FASTER[backend] - 1) * (1 + sorted(lengths).index(seq_len))
            measured = {
                "memory/attention_gib": batch * gib,
                "memory/attention_eager_gib": batch * eager,
                "memory/attention_saved_gib_vs_eager": batch * (eager - gib),
                "memory/attention_saved_ratio_vs_eager": eager / gib,
                "speed/attention_seconds": 0.002 / faster,
                "speed/attention_speedup_vs_eager": faster,
            }
            if not lost:
                measured |= {
                    "speed/tokens_per_second": 1e5 * FASTER[backend],
                    "speed/mfu": 0.1 * FASTER[backend],
                    "memory/peak_gib": 2 + 12 * batch * gib,
                    "energy/joules_per_token": 0.004,
                    "val/loss": 3.25 - seq_len / 16384 + 0.03 * BACKENDS.index(backend),
                }
            setting = {"backend": backend, "seq_len": seq_len, "batch_size": batch, "accumulate": 1, "n_devices": 1, "n_nodes": 1}
            setting |= {"strategy": "auto", "precision": "bf16-mixed", "compile": False, "n_params": 123, "gpu": gpu}
            overrides = [f"attention={backend}", f"data.seq_len={seq_len}", "trainer.max_steps=4"]
            status, error = ("out_of_memory", "CUDA ran out of memory") if lost else ("finished", None)
            write_run(folder / str(number), setting=setting, measured=measured, status=status, error=error, overrides=overrides)
            points.append(point(number, overrides, status, error))
    points.append(
        point(
            len(points),
            ["attention=flash_v3", "data.seq_len=1024", "trainer.max_steps=4"],
            "failed",
            "flash_v3 needs <Hopper> & more",
        )
    )
    found = {"command": ["train.py", "-m", "attention=flash_v2,eager,sdpa"], "overrides": [], "started": "", "points": points}
    (folder / "points.json").write_text(json.dumps(found))
    return folder


def point(number: int, overrides: list[str], status: str, error: str | None) -> dict:
    """An entry of points.json."""
    ended = {"status": status, "error": error, "exit_code": int(status == "failed"), "seconds": 13.0, "gpus": [0]}
    return {"number": number, "folder": str(number), "overrides": overrides, **ended}
