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


@dataclass
class Result:
    """A grid measured, and where."""

    device: str
    torch: str
    config: dict
    cells: list[Cell]


def benchmark(cfg: BenchmarkConfig) -> Result:
    """Measures the grid, or reads cfg.read; prints the table, writes cfg.out (JSON) and cfg.plot (PNG).

    Raises UserError without a GPU, and for a file that cannot be read.
    """
    result = read(Path(cfg.read)) if cfg.read else measure_grid(cfg)
    if cfg.read:
        print_header(result)
        for row in rows(result):
            print_row(row, result)
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(asdict(result), indent=1))
        print(f"\nfigures in {cfg.out}")
    if cfg.plot:
        plot(result, Path(cfg.plot))
        print(f"\npicture in {cfg.plot}")
    return result


def read(path: Path) -> Result:
    """What an earlier run wrote with out=; raises UserError where it is not that."""
    try:
        found = json.loads(path.read_text())
        return Result(found["device"], found["torch"], found["config"], [Cell(**cell) for cell in found["cells"]])
    except OSError as error:
        raise UserError(f"read={path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"read={path} is not a result of this command; out=PATH writes one") from None


def measure_grid(cfg: BenchmarkConfig) -> Result:
    """Every backend at every shape, printed as it goes."""
    if not torch.cuda.is_available():
        raise UserError("benchmark_attention.py needs an NVIDIA GPU, and PyTorch finds none here; read=FILE shows an earlier run")
    device = torch.device("cuda", torch.cuda.current_device())
    result = Result(describe(device), torch.__version__, asdict(cfg), [])
    print_header(result)
    for causal in cfg.causal:
        for head_dim in cfg.head_dim:
            for seq_len in cfg.seq_len:
                row = [measure(cfg, backend, head_dim, seq_len, causal, device) for backend in cfg.backends]
                result.cells += row
                print_row(row, result)
    return result


def rows(result: Result) -> list[list[Cell]]:
    """The cells of each shape, in the order measured."""
    shapes: dict[tuple, list[Cell]] = {}
    for cell in result.cells:
        shapes.setdefault((cell.causal, cell.head_dim, cell.seq_len), []).append(cell)
    return list(shapes.values())


def print_header(result: Result) -> None:
    """Where and on what."""
    cfg = result.config
    print(f"{result.device}; torch {result.torch}; {cfg['dtype']}; {cfg['tokens']} tokens, width {cfg['width']}")
    print(f"TFLOP/s forward / backward and peak memory above the inputs; in brackets the multiple of {cfg['baseline']}'s speed\n")


def print_row(row: list[Cell], result: Result) -> None:
    """One shape, all backends."""
    baseline = next(cell for cell in row if cell.backend == result.config["baseline"])
    shape = f"{'causal' if row[0].causal else 'full':<6} D={row[0].head_dim:<3} S={row[0].seq_len:<6}"
    print(shape + "  ".join(describe_cell(cell, baseline) for cell in row), flush=True)


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


def plot(result: Result, path: Path) -> None:
    """One panel for each direction, mask and head_dim: TFLOP/s over sequence length, a line a backend."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(not cell.causal, cell.head_dim) for cell in result.cells})
    figure, axes = plt.subplots(2, len(panels), figsize=(3.4 * len(panels), 6), sharex=True, sharey="row", squeeze=False)
    backends = list(dict.fromkeys(cell.backend for cell in result.cells))
    for column, (full, head_dim) in enumerate(panels):
        for number_of_row, figure_of in enumerate(("forward_tflops", "backward_tflops")):
            axis = axes[number_of_row][column]
            for number, backend in enumerate(backends):
                cells = [c for c in result.cells if (c.backend, not c.causal, c.head_dim) == (backend, full, head_dim)]
                drawn = [(c.seq_len, getattr(c, figure_of)) for c in cells if getattr(c, figure_of) is not None]
                width = 2.5 if backend.startswith("flash") else 1.2
                axis.plot(*zip(*drawn, strict=True), marker="o", markersize=4, color=f"C{number}", linewidth=width, label=backend)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted({c.seq_len for c in result.cells}), [str(s) for s in sorted({c.seq_len for c in result.cells})])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if number_of_row == 0:
                axis.set_title(f"{'full' if full else 'causal'}, head_dim {head_dim}", fontsize=10)
            else:
                axis.set_xlabel("sequence length")
    for line in axes:
        line[0].set_ylim(bottom=0)  # shared along a row, once every line is drawn
    axes[0][0].set_ylabel("forward, TFLOP/s")
    axes[1][0].set_ylabel("backward, TFLOP/s")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"Attention on one {result.device}, {result.config['dtype']}, {result.config['tokens']} tokens", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
