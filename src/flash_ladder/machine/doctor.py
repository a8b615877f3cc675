"""scripts/doctor.py: what this machine is, which attention runs a call on it and why, and what is missing.

`diagnose` asks and judges nothing itself. The rungs say through `kernels.attention.why_not` what they refuse, PyTorch says which of
its own kernels it takes (machine.sdpa_choice), and machine.hardware says what is installed. `report` puts the answers
into words.
"""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from flash_ladder.files import check_file, write_json
from flash_ladder.kernels import Unsupported, choose, jit
from flash_ladder.kernels.asked import ARGUMENTS
from flash_ladder.kernels.choice import BACKENDS, why_not
from flash_ladder.kernels.generations import capability, dtype_name
from flash_ladder.machine import hardware as machine
from flash_ladder.machine.decide import DTYPES, pick_device, pick_precision
from flash_ladder.machine.hardware import Extra, Gpu, Package
from flash_ladder.machine.sdpa_choice import AttentionCall, SdpaChoice, ask_sdpa, flash_in_words
from flash_ladder.names import is_kernel
from flash_ladder.script_schema import DoctorConfig

ALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEAD_DIMS = range(8, 513, 8)
MALICIOUS_LIGHTNING = ("2.6.2", "2.6.3")
EXPERIMENT_BATCH = 64  # of conf/experiment/gpt2_124m.yaml: 28.9 GiB on an H200 with sdpa, about 2 and 0.42 per sequence
WIDTH = 100


@dataclass(frozen=True)
class Rung:
    """One backend's answers on this machine."""

    name: str
    refusal: str | None  # why it cannot run the call; None where it can
    head_dims: dict[str, str]  # by dtype, "16 to 256"; a missing dtype is refused
    lacks: list[str]  # arguments of `attention` that it refuses


@dataclass(frozen=True)
class Diagnosis:
    """Everything that doctor found."""

    gpus: list[Gpu]
    no_gpu: str | None  # why there is none
    driver: str | None
    versions: dict[str, str | None]
    packages: list[Package]
    extras: list[Extra]
    call: AttentionCall
    dtype_reason: str
    auto: str  # the backend that `auto` takes and why, or that none can run
    rungs: list[Rung]
    sdpa: SdpaChoice | None  # None where PyTorch could not be asked
    sdpa_note: str | None
    sdpa_flash: str  # whose FlashAttention PyTorch's flash kernel is
    warnings: list[str]
    next: list[str]  # commands to type


def doctor(cfg: DoctorConfig) -> None:
    """Prints the report on this machine, and writes it to cfg.out as JSON. Raises UserError for a device that is not here."""
    if cfg.out:
        check_file(Path(cfg.out), "out")
    found = diagnose(cfg)
    print(report(found))
    if cfg.out:
        write_json(Path(cfg.out), as_json(found))
        print(f"\nwritten to {cfg.out}")


# ---- asking ----


def diagnose(cfg: DoctorConfig) -> Diagnosis:
    """Asks this machine everything. Raises UserError for a device that is not here."""
    device = pick_device(cfg.device)
    precision, reason = pick_precision("auto", device)
    dtype = DTYPES[precision] if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    call = AttentionCall(
        device, dtype, cfg.batch_size, cfg.n_head, cfg.n_kv_head or cfg.n_head, cfg.seq_len, cfg.head_dim, cfg.features
    )
    gpus, driver = machine.find_gpus(), machine.nvidia_driver()
    rungs = [ask_rung(name, call) for name in BACKENDS]
    try:
        auto = str(choose(device, dtype, call.head_dim, features=call.features))
    except Unsupported as error:
        auto = str(error)
    try:
        sdpa, note = ask_sdpa(call), None
    except RuntimeError as error:  # a GPU that this PyTorch has no code for, or with no memory left
        sdpa, note = None, f"could not be asked: {str(error).strip().splitlines()[0]}"
    lacking = sorted(call.features.intersection(*(rung.lacks for rung in rungs if rung.name == "sdpa")))
    if sdpa and lacking:
        note = f"asked without {' and '.join(lacking)}, which PyTorch's operation does not have here"
    packages = machine.packages()
    return Diagnosis(
        gpus=gpus,
        no_gpu=None if gpus else machine.why_no_gpu(driver),
        driver=driver,
        versions={"python": platform.python_version(), "torch": machine.torch_build(), "cudnn": machine.cudnn_version()},
        packages=packages,
        extras=machine.extras(),
        call=call,
        dtype_reason=reason if cfg.dtype == "auto" else "asked for",
        auto=auto,
        rungs=rungs,
        sdpa=sdpa,
        sdpa_note=note,
        sdpa_flash=flash_in_words(device),
        warnings=list(find_warnings(call, gpus, packages)),
        next=next_commands(call, gpus, rungs),
    )


def ask_rung(name: str, call: AttentionCall) -> Rung:
    """What a backend refuses: the call, each dtype and head_dim alone, and each argument at a shape that the backend takes."""
    able = {dtype: [d for d in HEAD_DIMS if why_not(name, call.device, dtype, d, frozenset()) is None] for dtype in ALL_DTYPES}
    shapes = [(dtype, d) for dtype, head_dims in able.items() for d in head_dims]
    lacks = [f for f in ARGUMENTS if shapes and why_not(name, call.device, *shapes[0], frozenset({f})) is not None]
    return Rung(
        name,
        why_not(name, call.device, call.dtype, call.head_dim, call.features),
        {dtype_name(dtype): ranges(head_dims) for dtype, head_dims in able.items() if head_dims},
        lacks,
    )


def ranges(head_dims: list[int]) -> str:
    """ "16 to 256" where no step of HEAD_DIMS is missing, "16 to 64, 128" where there are gaps."""
    ends = [head_dims[0]]
    for before, after in pairwise(head_dims):
        if after - before > HEAD_DIMS.step:
            ends += [before, after]
    ends.append(head_dims[-1])
    return ", ".join(f"{a} to {b}" if a != b else f"{a}" for a, b in zip(ends[::2], ends[1::2], strict=True))


def find_warnings(call: AttentionCall, gpus: list[Gpu], packages: list[Package]) -> Iterator[str]:
    """What would fail or run slower than it need, each with what to do about it."""
    for package in packages:
        if package.name == "lightning" and package.version in MALICIOUS_LIGHTNING:
            yield (
                f"lightning {package.version} was a malicious release: uninstall it, install lightning{package.wanted}, and change "
                "the passwords and keys that this machine holds"
            )
        elif not package.fits:
            has = f"is {package.version}" if package.version else "is not installed"
            yield f"{package.name} {has}, and this project asks for {package.wanted}: pip install -r requirements.txt"
    if not packages:
        yield "this project is not installed, so versions are not checked: pip install -r requirements.txt from a clone"
    for gpu in gpus:
        if not gpu.built_for:
            yield f"this PyTorch has no code for GPU {gpu.index} ({gpu.architecture}): install a build that has, as its site lists"
    if len({gpu.name for gpu in gpus}) > 1:
        yield "the GPUs differ: training on all of them goes at the pace of the slowest; CUDA_VISIBLE_DEVICES picks those alike"
    if call.device.type == "cpu":
        trouble = jit.interpreter_trouble() if machine.version_of("triton") else None
        if trouble:
            yield f"flash_v1 and flash_v2 cannot run on this CPU: {trouble}"
        return
    found = capability(call.device)
    if found and found < (8, 0) and call.dtype == torch.bfloat16:
        yield f"compute capability {found[0]}.{found[1]} has no bf16: take dtype=float16 (trainer.precision=16-mixed)"
    if jit.INTERPRET:
        yield "TRITON_INTERPRET=1 is set: flash_v1 and flash_v2 would run in Triton's interpreter, not on the GPU; unset it"
    elif trouble := machine.compiler_trouble():
        yield trouble


def next_commands(call: AttentionCall, gpus: list[Gpu], rungs: list[Rung]) -> list[str]:
    """The commands to type next on such a machine."""
    documents = " data.document_ids=true" if "document_ids" in call.features else ""
    if call.device.type == "cpu":
        return [f"python train.py{' trainer.accelerator=cpu' if gpus else ''}{documents}"]
    able = [rung.name for rung in rungs if is_kernel(rung.name) and rung.refusal is None]
    benchmark = [f"python scripts/benchmark_attention.py head_dim=[{call.head_dim}]"] if able else []
    found = capability(call.device)
    if found and found < (7, 0):  # the experiment uses torch.compile, which needs Volta
        return [f"python train.py{documents}", *benchmark]
    batch_size = EXPERIMENT_BATCH
    while batch_size > 1 and 2 + 0.45 * batch_size > 0.8 * min(gpu.memory_gib for gpu in gpus):
        batch_size //= 2
    fits = "" if batch_size == EXPERIMENT_BATCH else f" data.batch_size={batch_size} trainer.accumulate={512 // batch_size}"
    several = f" trainer=ddp trainer.devices={len(gpus)}" if len(gpus) > 1 else ""
    return [f"python train.py experiment=gpt2_124m{fits}{several}{documents}", *benchmark]


# ---- telling ----


def as_json(found: Diagnosis) -> dict[str, Any]:
    """The diagnosis as plain data."""
    plain = asdict(found)
    call = found.call
    plain["call"] |= {"device": str(call.device), "dtype": dtype_name(call.dtype), "features": sorted(call.features)}
    return plain


def report(found: Diagnosis) -> str:
    """The diagnosis for a reader, at most WIDTH columns wide."""
    parts = {
        "this machine": _machine(found),
        "the call": _call(found),
        "the rungs, asked about head_dim 8 to 512 in steps of 8": _rungs(found),
        "attention=sdpa, which comes down to one of PyTorch's own kernels": _sdpa(found),
        "optional packages": [(extra.module, f"{extra.installed or 'not installed'} ({extra.purpose})") for extra in found.extras],
        "warnings": [("-", warning) for warning in found.warnings],
        "next": [("", command) for command in found.next],
    }
    return "\n\n".join(f"{title}\n{_table(list(rows))}" for title, rows in parts.items() if rows)


def _table(rows: list[tuple[str, str]]) -> str:
    """Labels in one column, their texts wrapped in the other."""
    column = max(len(label) for label, _ in rows) + 3 if any(label for label, _ in rows) else 2
    lines = []
    for label, words in rows:
        first = f"  {label}".ljust(column)
        lines.append(textwrap.fill(words, WIDTH, initial_indent=first, subsequent_indent=" " * column, break_on_hyphens=False))
    return "\n".join(lines)


Rows = Iterator[tuple[str, str]]


def _machine(found: Diagnosis) -> Rows:
    dtype = dtype_name(found.call.dtype)
    for gpu in found.gpus:
        yield f"GPU {gpu.index}", f"{gpu.name}, {gpu.architecture}; {gpu.generation}"
        shared = f", {gpu.shared_memory_kib:.0f} KiB of shared memory a block" if gpu.shared_memory_kib else ""
        free = "how much is free cannot be read" if gpu.free_gib is None else f"{gpu.free_gib:.1f} GiB free"
        yield "", f"{gpu.multiprocessors} multiprocessors{shared}, {gpu.memory_gib:.1f} GiB of memory, {free}"
        peak = gpu.peak_tflops.get(dtype)
        yield (
            "",
            f"peak {peak:,g} TFLOP/s in {dtype}, for MFU"
            if peak
            else f"its peak in {dtype} is not in the table, so a run logs no MFU",
        )
    if found.no_gpu:
        yield "GPU", f"none: {found.no_gpu}"
    if found.call.device.type == "cpu" and any(rung.head_dims for rung in found.rungs if is_kernel(rung.name)):
        yield "", "on the CPU flash_v1 and flash_v2 run in Triton's interpreter: for checking a kernel, far too slow to train with"
    if found.driver or found.gpus:
        yield "driver", found.driver or "unknown (nvidia-smi does not answer)"
    yield "versions", ", ".join(f"{name} {version}" for name, version in found.versions.items() if version)
    if found.packages:
        yield "packages", ", ".join(f"{p.name} {p.version or 'not installed'}" for p in found.packages if p.name != "torch")


def _call(found: Diagnosis) -> Rows:
    call = found.call
    heads = f"{call.n_head} heads" + (f" sharing {call.n_kv_head} of keys and values" if call.n_kv_head != call.n_head else "")
    yield "shape", f"batch {call.batch_size}, {heads}, {call.seq_len:,} positions, head_dim {call.head_dim}"
    yield "dtype", f"{dtype_name(call.dtype)} ({found.dtype_reason})"
    yield "meaning", ", ".join(name for name in ARGUMENTS if name in call.features) or "full attention"
    yield "attention=auto", found.auto


def _rungs(found: Diagnosis) -> Rows:
    for rung in found.rungs:
        yield rung.name, f"does not run the call: {rung.refusal}" if rung.refusal else "runs the call"
        if not rung.head_dims:
            yield "", "takes nothing on this device"
            continue
        by_range: dict[str, list[str]] = {}
        for dtype, span in rung.head_dims.items():
            by_range.setdefault(span, []).append(dtype)
        takes = (f"{', '.join(dtypes)} with head_dim {span}" for span, dtypes in by_range.items())
        yield "", f"takes {'; '.join(takes)}"
        yield "", f"lacks {', '.join(rung.lacks) or 'nothing'}"


def _sdpa(found: Diagnosis) -> Rows:
    if found.sdpa:
        first, *behind = found.sdpa.order or ["none, it refuses the call"]
        yield "runs", first
        if behind:
            yield "behind it", ", then ".join(behind)
        for name, reasons in found.sdpa.refused.items():
            yield f"not {name}", reasons
    instead = [name for name in found.sdpa.order[:1] if name != "flash"] if found.sdpa else []
    yield "flash is", found.sdpa_flash + "".join(f"; this call runs {name} instead" for name in instead)
    if found.sdpa_note:
        yield "note", found.sdpa_note
