"""Which tiles are fastest on this GPU: the evidence behind a row of kernels/tiles.py.

Every candidate that should fit the GPU is compiled (in several processes), checked against the table's own tile, and timed on every
shape. The one with the best geometric mean wins. Nothing is tuned while training runs: a person reads the result and writes it into
the table.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flash_ladder.benchmark.result import batch_size
from flash_ladder.errors import UserError
from flash_ladder.files import check_file
from flash_ladder.kernels import flash_v2
from flash_ladder.kernels.asked import Asked
from flash_ladder.kernels.generations import capability, describe
from flash_ladder.kernels.tiles import Tile, Tiles, tiles_for
from flash_ladder.machine.hardware import version_of
from flash_ladder.measure.flops import BACKWARD, forward_flops
from flash_ladder.script_schema import TuneConfig

KERNELS = ("forward", "dq", "dkdv")
SHOWN = 4  # best candidates shown in a line of the ranking


@dataclass
class Candidate:
    """One tile for one kernel, and its TFLOP/s by shape (causal, seq_len), counted for the pass that the kernel is part of."""

    tile: Tile
    speeds: dict[tuple[bool, int], float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The geometric mean over the shapes."""
        return math.exp(sum(math.log(speed) for speed in self.speeds.values()) / len(self.speeds)) if self.speeds else 0.0


def tune(cfg: TuneConfig) -> dict[int, Tiles]:
    """Times candidates for every head_dim and kernel. Prints the best of each, and the rows for kernels/tiles.py (also to `out`).

    Raises UserError where there is no NVIDIA GPU of compute capability 7.5 or more.
    """
    found = capability(torch.device("cuda")) if torch.cuda.is_available() else None
    if found is None or found < (7, 5):
        raise UserError("tune_tiles.py times kernels on an NVIDIA GPU, Turing or newer, and PyTorch finds none here")
    if found == (7, 5) and cfg.dtype != "float16":
        raise UserError("Turing's tensor cores take float16 alone; dtype=float16 would work")
    device = torch.device("cuda", torch.cuda.current_device())
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in its stub
    print(f"{describe(device)}; torch {torch.__version__}, triton {version_of('triton')}; {cfg.dtype}")
    print("TFLOP/s of the pass that a kernel is part of, geometric mean over the shapes; tiles are queries, keys, warps, stages\n")
    chosen = {}
    context = multiprocessing.get_context("spawn")
    if cfg.out:
        check_file(Path(cfg.out), "out")
    with ProcessPoolExecutor(cfg.processes or min(8, os.cpu_count() or 1), mp_context=context) as pool:
        for head_dim in cfg.head_dim:
            row = tiles_for(found, getattr(torch, cfg.dtype), head_dim)
            for kernel in cfg.kernels:
                tiles = candidates(kernel, head_dim, shared, stages=(1,) if found == (7, 5) else (1, 2, 3, 4))
                tiles = [getattr(row, kernel)] + [tile for tile in tiles if tile != getattr(row, kernel)]
                jobs = [(cfg, head_dim, replace(row, **{kernel: tile}), device.index) for tile in tiles]
                runs = list(tqdm(pool.map(compiles, jobs), f"head_dim {head_dim}, {kernel}: compiling", len(jobs), leave=False))
                able = [Candidate(tile) for tile, run in zip(tiles, runs, strict=True) if run]
                if not able:
                    raise UserError(
                        f"head_dim={head_dim}: not even the table's tile for {kernel}, {spell(tiles[0])}, runs on this GPU"
                    )
                time_all(cfg, head_dim, kernel, row, able, device)
                able.sort(key=lambda candidate: -candidate.score)
                print(describe_ranking(head_dim, kernel, able, getattr(row, kernel)), flush=True)
                row = replace(row, **{kernel: able[0].tile})
            chosen[head_dim] = row
    text = rows(chosen, f"{describe(device)}, torch {torch.__version__}, triton {version_of('triton')}, {date.today()}")
    print(f"\n{text}")
    if cfg.out:
        Path(cfg.out).write_text(text)
        print(f"\nrows in {cfg.out}")
    return chosen


def candidates(kernel: str, head_dim: int, shared: int, stages: tuple[int, ...]) -> list[Tile]:
    """Tiles whose operands should fit into `shared` bytes and whose accumulators into registers.

    Operands have 16 bits, accumulators are float32. Some tiles that pass do not compile after all; `compiles` finds those.
    """
    width = max(16, 1 << (head_dim - 1).bit_length())
    fitting = []
    for block_q, block_k, warps, stage in product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), stages):
        resident, streamed, results, scores = {
            "forward": (block_q, 2 * block_k, block_q, 1),
            "dq": (2 * block_q, 2 * block_k, block_q, 2),
            "dkdv": (2 * block_k, 2 * block_q, 2 * block_k, 2),
        }[kernel]
        registers = (results * width + scores * block_q * block_k) / (32 * warps)
        if 2 * width * (resident + stage * streamed) <= shared and 24 <= registers <= 230:
            fitting.append(Tile(block_q, block_k, warps, stage))
    return fitting


def inputs(cfg: TuneConfig, head_dim: int, seq_len: int, device: torch.device) -> list[Tensor]:
    """Query, key, value and the output's gradient, [B, H, S, D] in memory [B, S, H, D]."""
    shape = (batch_size(cfg.tokens, seq_len), seq_len, cfg.width // head_dim, head_dim)
    return [torch.randn(shape, device=device, dtype=getattr(torch, cfg.dtype)).transpose(1, 2) for _ in range(4)]


def compiles(job: tuple[TuneConfig, int, Tiles, int]) -> bool:
    """Whether all masks of one candidate compile, fit and give the results of the table's tiles; runs in its own process.

    A GPU error (an illegal address, say) ends that process's GPU context, and so fails every later candidate of that process.
    """
    from triton.errors import TritonError

    cfg, head_dim, row, index = job
    device = torch.device("cuda", index)
    torch.manual_seed(0)
    query, key, value, grad = inputs(replace(cfg, tokens=256, width=head_dim), head_dim, 256, device)
    try:
        for causal in cfg.causal:
            results = []
            for use in (None, row):
                asked = Asked(head_dim**-0.5, is_causal=causal)
                output, lse = flash_v2.forward(query, key, value, asked, use=use)
                results.append((output, lse, *flash_v2.backward(grad, None, query, key, value, output, lse, asked, use=use)))
            for expected, found in zip(*results, strict=True):
                torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    except (TritonError, RuntimeError, AssertionError):  # too large, refused by a compiler, out of memory, or wrong
        return False
    return True


def time_all(cfg: TuneConfig, head_dim: int, kernel: str, row: Tiles, able: list[Candidate], device: torch.device) -> None:
    """Times every candidate on every shape, all candidates of a shape one after the other."""
    from triton.testing import do_bench

    shapes = list(product(cfg.causal, cfg.seq_len))
    with tqdm(total=len(shapes) * len(able), desc=f"head_dim {head_dim}, {kernel}: timing", leave=False) as bar:
        for causal, seq_len in shapes:
            query, key, value, grad = inputs(cfg, head_dim, seq_len, device)
            asked = Asked(head_dim**-0.5, is_causal=causal)
            output, lse = flash_v2.forward(query, key, value, asked)
            batch, n_head, _, _ = query.shape
            work = forward_flops(batch, n_head, seq_len, head_dim, is_causal=causal)
            for candidate in able:
                use = replace(row, **{kernel: candidate.tile})
                run: Callable[[], object]
                if kernel == "forward":
                    run = partial(flash_v2.forward, query, key, value, asked, use=use)
                else:
                    run = partial(flash_v2.backward, grad, None, query, key, value, output, lse, asked, use=use)
                flops = work if kernel == "forward" else BACKWARD * work
                milliseconds = do_bench(run, warmup=cfg.milliseconds // 4, rep=cfg.milliseconds, return_mode="median")
                candidate.speeds[causal, seq_len] = flops / milliseconds / 1e9
                bar.update()


def describe_ranking(head_dim: int, kernel: str, able: list[Candidate], before: Tile) -> str:
    """`D 64  forward  64,64,4,3 380 (309-428)  128,64,8,3 371 (...)`, including the table's present tile."""
    shown = able[:SHOWN] + [candidate for candidate in able[SHOWN:] if candidate.tile == before]
    words = [
        f"{spell(c.tile)} {c.score:.0f} ({min(c.speeds.values()):.0f}-{max(c.speeds.values()):.0f})"
        + (" now" if c.tile == before else "")
        for c in shown
    ]
    return f"D {head_dim:<4} {kernel:<8} " + "  ".join(words)


def spell(tile: Tile) -> str:
    """`64,64,4,3`."""
    return f"{tile.block_q},{tile.block_k},{tile.num_warps},{tile.num_stages}"


def rows(chosen: dict[int, Tiles], where: str) -> str:
    """The rows in the form of kernels/tiles.py."""
    lines = [f"# {where}"]
    for head_dim, row in chosen.items():
        tiles = ", ".join(f"{kernel}=Tile({spell(getattr(row, kernel)).replace(',', ', ')})" for kernel in KERNELS)
        lines.append(f"    {head_dim}: Tiles({tiles}),")
    return "\n".join(lines) + "\n"
