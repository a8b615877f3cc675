"""The benchmark of attention alone: speed, memory and error of every backend, side by side in one run.

FLOPs are those of the algorithm whatever a backend recomputes: 4·B·H·S²·D forward, half of it under causality, and 2.5 times that
backward, the convention of the FlashAttention papers. Inputs are random normal. A time is the median of repeated calls between
CUDA events, the L2 cache flushed before each. A CPU's times say nothing about a GPU, so there only memory and error are measured.
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from flash_ladder.benchmark.accuracy import measure_error, yardstick
from flash_ladder.benchmark.masks import measure_masks, with_masks
from flash_ladder.benchmark.peers import installed_package, why_not_installed
from flash_ladder.benchmark.plots import plot
from flash_ladder.benchmark.result import GIB, Cell, Panel, Result, batch_size, read, save
from flash_ladder.benchmark.tables import header, row_lines, summary, table_head
from flash_ladder.benchmark.timing import (
    NoBackward,
    attend_with,
    backward_milliseconds,
    failure_note,
    forward_milliseconds,
    gradients,
    random_inputs,
)
from flash_ladder.errors import UserError
from flash_ladder.files import check_file
from flash_ladder.kernels import BACKENDS
from flash_ladder.kernels.choice import why_not
from flash_ladder.kernels.generations import describe
from flash_ladder.machine.hardware import cudnn_version, nvidia_driver, version_of
from flash_ladder.measure.flops import BACKWARD, forward_flops
from flash_ladder.measure.peak_memory import peak_bytes
from flash_ladder.measure.probe import Layer, eager_may_fit
from flash_ladder.memory import machine_memory, must_fit
from flash_ladder.names import PEERS, is_kernel
from flash_ladder.script_schema import BenchmarkConfig, CompleteBenchmark

# What a null in the configuration stands for.
ON_GPU = {
    "seq_len": [1024, 4096, 16384],
    "memory_seq_len": [8192, 65536],
    "head_dim": [64, 128],
    "tokens": 16384,
    "width": 2048,
    "dtype": "bfloat16",
    "error_seq_len": 1024,
}
ON_CPU = {
    "seq_len": [64, 128, 256],
    "memory_seq_len": [512, 1024, 2048],
    "head_dim": [32],
    "tokens": 256,
    "width": 64,
    "dtype": "float32",
    "error_seq_len": 128,
}


def benchmark(cfg: BenchmarkConfig) -> Result:
    """Measures the grid, or reads cfg.read; prints the tables, writes cfg.out (JSON) and the pictures of cfg.plot (PNG).

    An interrupted run leaves in cfg.out what it has measured. Raises UserError for files that cannot be read or written.
    """
    if cfg.read:
        result = read(Path(cfg.read))
        print("\n".join([*header(result), *(table_head(result) if result.cells else [])]))
        for row in result.rows():
            print("\n".join(row_lines(row, result)))
    else:
        result = measure_grid(cfg)
    print("\n".join(summary(result)))
    if cfg.out:
        save(result, Path(cfg.out))
        print(f"\nfigures in {cfg.out}")
    if cfg.plot:
        try:
            pictures = plot(result, Path(cfg.plot))
        except OSError as error:
            raise UserError(f"plot={cfg.plot} cannot be written ({error.strerror}); name another file") from None
        print(f"\npictures: {', '.join(map(str, pictures)) or 'none, as no speed, memory or error was measured'}")
    return result


def measure_grid(asked: BenchmarkConfig) -> Result:
    """Measures every backend at every shape, then under every mask. Prints as it goes, and writes asked.out after every shape."""
    for key, path in (("out", asked.out), ("plot", asked.plot)):
        if path:
            check_file(Path(path), key)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    cfg, left_out = complete(asked, device)
    check_here(asked.backends or [], cfg, device)
    result = Result(left_out=left_out, finished=False, **surroundings(cfg, device))
    lengths = sorted({*cfg.seq_len, *cfg.memory_seq_len})
    panels = [Panel(causal, head_dim, heads) for heads in cfg.n_kv_head for causal in cfg.causal for head_dim in cfg.head_dim]
    panels = panels if lengths else []  # no length: the masks alone
    compared = [*cfg.backends, *(["eager"] if "eager" not in cfg.backends else [])]  # eager's error is everyone's yardstick
    print("\n".join([*header(result), *(table_head(result) if panels else [])]), flush=True)
    steps = len(panels) * (len(lengths) * len(cfg.backends) + len(compared))
    steps += len(cfg.head_dim) * len(with_masks(cfg.backends)) * (1 + len(cfg.masks)) if on_gpu and cfg.masks else 0
    with tqdm(total=steps, leave=False, disable=None) as bar:

        def next_is(what: str) -> None:
            bar.update()
            bar.set_description(what)

        try:
            for panel in panels:
                for seq_len in lengths:
                    for backend in cfg.backends:
                        next_is(f"{backend}, {panel} S={seq_len}")
                        result.cells.append(measure_cell(cfg, backend, panel, seq_len, device))
                    bar.write("\n".join(row_lines(result.rows()[-1], result)))
                    sys.stdout.flush()
                    if cfg.out:
                        save(result, Path(cfg.out))
                right = yardstick(cfg, panel, device)
                for backend in compared:
                    next_is(f"error of {backend}, {panel}")
                    result.errors.append(measure_error(cfg, backend, panel, right, device))
            if on_gpu and panels:
                for backend in cfg.backends:
                    result.host_us[backend] = measure_host_us(cfg, backend, device)
            for masked in measure_masks(cfg, device, next_is):
                result.masks.append(masked)
                if cfg.out:
                    save(result, Path(cfg.out))
            result.finished = True
        finally:
            if cfg.out and (result.cells or result.masks):
                save(result, Path(cfg.out))
                if not result.finished:
                    print(f"\nfigures so far in {cfg.out}")
    return result


def complete(cfg: BenchmarkConfig, device: torch.device) -> tuple[CompleteBenchmark, dict[str, str]]:
    """`cfg` with every None decided for this device, checked again; and the peers that the default leaves out, with reasons."""
    values = ON_GPU if device.type == "cuda" else ON_CPU
    chosen = vars(cfg) | {name: value for name, value in values.items() if getattr(cfg, name) is None}
    left_out = {}
    if cfg.backends is None:
        for name in PEERS:
            reason = why_not_installed(name) if device.type == "cuda" or PEERS[name].on_a_cpu else "for a GPU"
            if reason is not None:
                left_out[name] = reason
        chosen["backends"] = [*BACKENDS, *(name for name in PEERS if name not in left_out)]
    if cfg.baseline is None:
        usual = "fa2" if device.type == "cuda" else "eager"
        chosen["baseline"] = usual if usual in chosen["backends"] else chosen["backends"][0]
    decided = CompleteBenchmark(**chosen)
    decided.validate()
    if device.type == "cpu" and not decided.seq_len and not decided.memory_seq_len:
        raise UserError("seq_len=[] and memory_seq_len=[] leave the masks alone, which are timed on a GPU; name a length")
    return decided, left_out


def check_here(named: list[str], cfg: CompleteBenchmark, device: torch.device) -> None:
    """Raises UserError where a backend that was named needs a GPU and there is none, and for a length whose inputs fit nowhere."""
    for name in named if device.type == "cpu" else ():
        if name in PEERS and not PEERS[name].on_a_cpu:
            able = ", ".join(peer for peer in PEERS if PEERS[peer].on_a_cpu)
            raise UserError(f"backends={name} needs a GPU, and PyTorch finds none; {able} and this repository's own need none")
        if name in BACKENDS:
            refusals = [why_not(name, device, getattr(torch, cfg.dtype), size, frozenset()) for size in cfg.head_dim]
            if all(refusals):
                raise UserError(f"backends={name} cannot run here: {refusals[0]}; leave it out")
    there, where = machine_memory(), "this machine has"
    if device.type == "cuda":
        there, where = torch.cuda.get_device_properties(device).total_memory, "the GPU has"
    lengths = {"seq_len": cfg.seq_len, "memory_seq_len": cfg.memory_seq_len, "error_seq_len": [cfg.error_seq_len]}
    lengths["mask_seq_len"] = [cfg.mask_seq_len] if device.type == "cuda" else []
    for key, values in lengths.items():
        for seq_len in values:
            batch = batch_size(cfg.tokens, seq_len) if key in ("seq_len", "memory_seq_len") else 1
            for n_kv_head, head_dim in itertools.product(cfg.n_kv_head, cfg.head_dim):
                heads = 2 * (cfg.width // head_dim) + 2 * (n_kv_head or cfg.width // head_dim)  # of query and output, key and value
                n_bytes = batch * seq_len * heads * head_dim * getattr(torch, cfg.dtype).itemsize
                what = f"{key}={seq_len} with tokens={cfg.tokens} and width={cfg.width}: the inputs"
                must_fit(what, n_bytes, "smaller ones would fit", there, where)


def surroundings(cfg: CompleteBenchmark, device: torch.device) -> dict[str, Any]:
    """The fields of Result that say where and on what it was measured. The configuration leaves out paths."""
    found: dict[str, Any] = {
        "device": describe(device),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "packages": {name: package for name in cfg.backends if name in PEERS and (package := installed_package(name))},
        "date": date.today().isoformat(),
        "config": {key: value for key, value in asdict(cfg).items() if key not in ("out", "plot", "read")},
    }
    if device.type == "cuda":
        found["cudnn"] = cudnn_version()
        found["driver"] = nvidia_driver()
        found["device_gib"] = torch.cuda.get_device_properties(device).total_memory / GIB
    return found


# ---- one backend at one shape ----


def measure_cell(cfg: CompleteBenchmark, backend: str, panel: Panel, seq_len: int, device: torch.device) -> Cell:
    """One backend at one shape: memory, and on a GPU speed where seq_len is of the grid. A refusal is a result."""
    cell = Cell(backend, panel.head_dim, seq_len, panel.causal, n_kv_head=panel.n_kv_head)
    batch = batch_size(cfg.tokens, seq_len)
    n_head = cfg.width // panel.head_dim
    flops = forward_flops(batch, n_head, seq_len, panel.head_dim, panel.causal)
    if device.type == "cpu" and is_kernel(backend) and seq_len not in cfg.seq_len:
        cell.note = "not measured: too slow in Triton's interpreter"
        return cell

    def work() -> None:
        if device.type == "cpu" and backend in ("eager", "math"):  # where the system kills a process that runs out of memory
            refuse_what_cannot_fit(cfg, panel, batch, seq_len)
        attend = attend_with(backend, panel.causal, seq_len, device)
        inputs, grad_output = random_inputs(cfg, panel, batch, seq_len, device)

        def forward_and_backward() -> None:
            try:
                gradients(attend(*inputs), inputs, grad_output)
            except NoBackward as error:
                cell.note = str(error)

        if device.type == "cuda":
            forward_and_backward()  # compiles, and sets up the matrix library's workspace
        peak = peak_bytes(forward_and_backward, device)
        cell.peak_gib = None if cell.note else peak / GIB
        if device.type == "cuda" and seq_len in cfg.seq_len:
            cell.forward_tflops = flops / forward_milliseconds(attend, inputs, cfg.milliseconds) / 1e9
            if not cell.note:
                milliseconds = backward_milliseconds(attend, inputs, grad_output, cfg.milliseconds)
                cell.backward_tflops = BACKWARD * flops / milliseconds / 1e9

    cell.note = failure_note(work) or cell.note
    return cell


def refuse_what_cannot_fit(cfg: CompleteBenchmark, panel: Panel, batch: int, seq_len: int) -> None:
    """Raises MemoryError where eager's scores alone exceed a good part of the machine's free memory."""
    n_head = cfg.width // panel.head_dim
    layer = Layer(batch, n_head, n_head, seq_len, panel.head_dim, getattr(torch, cfg.dtype), torch.device("cpu"))
    if not eager_may_fit(layer):
        raise MemoryError(f"the scores alone take {layer.score_bytes / GIB:.1f} GiB")


def measure_host_us(cfg: CompleteBenchmark, backend: str, device: torch.device) -> float | None:
    """Median microseconds that the host spends on one forward call of a shape too small to keep the GPU busy; None if refused."""
    found = []

    def work() -> None:
        panel = Panel(cfg.causal[0], cfg.head_dim[0], 1)
        attend = attend_with(backend, panel.causal, 128, device)
        one_head = replace(cfg, width=panel.head_dim)
        inputs, _ = random_inputs(one_head, panel, 1, 128, device)
        with torch.no_grad():
            for _ in range(20):
                attend(*inputs)
            torch.cuda.synchronize(device)
            times = []
            for _ in range(200):
                start = time.perf_counter()
                attend(*inputs)
                times.append(time.perf_counter() - start)
            torch.cuda.synchronize(device)
        found.append(median(times) * 1e6)

    failure_note(work)
    return found[0] if found else None
