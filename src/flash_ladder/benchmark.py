"""Attention alone, measured: TFLOP/s each way and peak memory of every backend, side by side in one run.

FLOPs are those of the algorithm whatever a backend recomputes: 4·B·H·S²·D forward, half of it under causality, and 2.5 times that
backward, the convention of the FlashAttention papers. Inputs are random normal; every figure is a median over repeated calls
timed with CUDA events, the L2 cache flushed between them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_ladder.schema import BenchmarkConfig, UserError
from kernels import Unsupported, attention
from kernels.generations import describe

PEERS = {
    "fa2": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
GIB = 2**30


@dataclass
class Cell:
    """One backend at one shape. A figure that could not be taken is None, and `note` says why."""

    backend: str
    head_dim: int
    seq_len: int
    causal: bool
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    peak_gib: float | None = None
    note: str = ""


def benchmark(cfg: BenchmarkConfig) -> list[Cell]:
    """Measures the grid, prints a table as it goes, and writes cfg.out; raises UserError without a GPU."""
    if not torch.cuda.is_available():
        raise UserError("scripts/benchmark_attention.py needs an NVIDIA GPU, and PyTorch finds none here")
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{describe(device)}; torch {torch.__version__}; {cfg.dtype}; {cfg.tokens} tokens, width {cfg.width}")
    print(f"TFLOP/s forward / backward and peak memory above the inputs; in brackets the share of {cfg.baseline}'s speed\n")
    cells = []
    for causal in cfg.causal:
        for head_dim in cfg.head_dim:
            for seq_len in cfg.seq_len:
                row = [measure(cfg, backend, head_dim, seq_len, causal, device) for backend in cfg.backends]
                cells += row
                baseline = next(cell for cell in row if cell.backend == cfg.baseline)
                shape = f"{'causal' if causal else 'full':<6} D={head_dim:<3} S={seq_len:<6}"
                print(shape + "  ".join(describe_cell(cell, baseline) for cell in row), flush=True)
    if cfg.out:
        result = {
            "device": describe(device),
            "torch": torch.__version__,
            "config": asdict(cfg),
            "cells": [asdict(c) for c in cells],
        }
        Path(cfg.out).write_text(json.dumps(result, indent=1))
        print(f"\nwritten to {cfg.out}")
    return cells


def describe_cell(cell: Cell, baseline: Cell) -> str:
    """`flash_v2 394/301 (1.40/1.30) 0.1 GiB`."""
    if cell.note and cell.forward_tflops is None:
        return f"{cell.backend} {cell.note}"
    speeds = [(cell.forward_tflops, baseline.forward_tflops), (cell.backward_tflops, baseline.backward_tflops)]
    text = f"{cell.backend} " + "/".join("-" if mine is None else f"{mine:.0f}" for mine, _ in speeds)
    if cell is not baseline:
        text += " (" + "/".join("-" if not mine or not theirs else f"{mine / theirs:.2f}" for mine, theirs in speeds) + ")"
    return text + ("" if cell.peak_gib is None else f" {cell.peak_gib:.2f} GiB") + (f" {cell.note}" if cell.note else "")


def measure(cfg: BenchmarkConfig, backend: str, head_dim: int, seq_len: int, causal: bool, device: torch.device) -> Cell:
    """Times one backend at one shape; running out of memory is a result, and so is a refusal."""
    from triton.testing import do_bench

    cell = Cell(backend, head_dim, seq_len, causal)
    n_head = cfg.width // head_dim
    query, grad_output = (random(cfg, n_head, seq_len, head_dim, device) for _ in range(2))
    key, value = (random(cfg, cfg.n_kv_head or n_head, seq_len, head_dim, device) for _ in range(2))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    flops = 4 * query.shape[0] * n_head * seq_len**2 * head_dim * (0.5 if causal else 1.0)
    run = runner(backend, causal)

    def teraflops(function: Callable[[], object], work: float) -> float:
        return work / do_bench(function, warmup=25, rep=cfg.milliseconds, return_mode="median") / 1e9

    try:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        torch.autograd.grad(run(*inputs), inputs, grad_output)
        cell.peak_gib = (torch.cuda.max_memory_allocated(device) - before) / GIB
        with torch.no_grad():
            cell.forward_tflops = teraflops(lambda: run(*inputs), flops)
        output = run(*inputs)
        cell.backward_tflops = teraflops(lambda: torch.autograd.grad(output, inputs, grad_output, retain_graph=True), 2.5 * flops)
    except torch.OutOfMemoryError:
        cell.note = "out of memory"
    except (Unsupported, RuntimeError) as error:  # PyTorch reports "No available kernel" as a RuntimeError
        cell.note = f"refused: {str(error).splitlines()[0]}"
    return cell


def random(cfg: BenchmarkConfig, heads: int, seq_len: int, head_dim: int, device: torch.device) -> Tensor:
    """[B, heads, S, D] with B such that B·S is cfg.tokens (at least 1)."""
    return torch.randn(max(1, cfg.tokens // seq_len), heads, seq_len, head_dim, device=device, dtype=getattr(torch, cfg.dtype))


def runner(backend: str, causal: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A backend as a function of query, key and value."""
    if backend not in PEERS:
        return lambda query, key, value: attention(query, key, value, is_causal=causal, backend=backend)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(PEERS[backend]):
            grouped = query.shape[1] != key.shape[1]
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)

    return run
