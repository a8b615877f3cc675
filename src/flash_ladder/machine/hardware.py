"""What a machine has: its GPUs, or why PyTorch sees none, its driver, and which packages are installed in which version.

No package but torch and triton is imported, so that a broken or missing one can be reported.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from flash_ladder.kernels.generations import GENERATIONS, capability, generation
from flash_ladder.kernels.jit import installed
from flash_ladder.machine.decide import PRECISIONS
from flash_ladder.measure.flops import peak_tflops
from flash_ladder.names import PEERS
from flash_ladder.units import GIB

PROJECT = "flash-ladder"  # as pip knows it
# The packages that a run's numbers depend on, beside Python and PyTorch.
PACKAGES = ("triton", "lightning", "hydra-core", "datasets", "tokenizers", "safetensors", "wandb", PROJECT)


# ---- GPUs ----


@dataclass(frozen=True)
class Gpu:
    """One GPU that PyTorch sees."""

    index: int
    name: str
    architecture: str  # "compute capability 9.0"; AMD's name for it on ROCm
    generation: str  # "Hopper: wgmma tensor cores", or why the table lacks it
    multiprocessors: int
    shared_memory_kib: float | None  # that a thread block can get; None where PyTorch does not tell
    memory_gib: float
    free_gib: float | None  # None where it cannot be read
    peak_tflops: dict[str, float | None]  # by dtype, dense; None for a GPU that is not in the table of flash_ladder.measure.flops
    built_for: bool  # whether this PyTorch has kernels for it


def find_gpus() -> list[Gpu]:
    """Every GPU that PyTorch sees."""
    return [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def _gpu(index: int) -> Gpu:
    device = torch.device("cuda", index)
    properties = torch.cuda.get_device_properties(device)
    is_nvidia = capability(device) is not None
    try:
        free = torch.cuda.mem_get_info(device)[0] / GIB
    except RuntimeError:  # another process holds the GPU, or it is broken: a fact to report, not a reason to stop
        free = None
    shared = getattr(properties, "shared_memory_per_block_optin", None)  # not in ROCm's properties
    return Gpu(
        index=index,
        name=properties.name,
        architecture=f"compute capability {properties.major}.{properties.minor}" if is_nvidia else properties.gcnArchName,
        generation=generation_in_words(device),
        multiprocessors=properties.multi_processor_count,
        shared_memory_kib=shared and shared / 1024,
        memory_gib=properties.total_memory / GIB,
        free_gib=free,
        peak_tflops={dtype: peak_tflops(properties.name, precision) for dtype, precision in PRECISIONS.items()},
        built_for=not is_nvidia or has_code_for(torch.cuda.get_arch_list(), (properties.major, properties.minor)),
    )


def generation_in_words(device: torch.device) -> str:
    """ "Hopper: wgmma tensor cores", or why there is no name for it."""
    entry, found = generation(device), capability(device)
    if entry is not None:
        return f"{entry.name}: {entry.brings}"
    if found is None:
        return "not NVIDIA's: the flash rungs do not run on it"
    table = [known for entry in GENERATIONS for known in entry.capabilities]
    if found < min(table):
        return f"older than {GENERATIONS[0].name}, the first generation that the rungs are written for"
    if found > max(table):
        return "newer than the table in kernels/generations.py: auto takes no flash rung; ask for one by name to try it"
    return "not in the table in kernels/generations.py: auto takes no flash rung; ask for one by name to try it"


def has_code_for(arch_list: list[str], found: tuple[int, int]) -> bool:
    """Whether a build has code for a GPU of capability `found`.

    "sm_86" is machine code for 8.6 and later in 8.x, "compute_86" is PTX for 8.6 and all later, "sm_90a" is for 9.0 alone.
    """
    for arch in arch_list:
        kind, _, digits = arch.partition("_")
        number = int(digits.rstrip("af"))
        built = (number // 10, number % 10)
        if digits[-1] == "a" and built != found:  # for that one architecture
            continue
        if built <= found and (kind == "compute" or built[0] == found[0]):
            return True
    return False


def why_no_gpu(driver: str | None) -> str:
    """Why PyTorch sees no GPU, and what would help.

    driver: the version of NVIDIA's driver, None where none is installed.
    """
    if torch.version.hip is not None:
        return "PyTorch is built for ROCm and finds no AMD GPU; on an NVIDIA machine install its CUDA build"
    if torch.version.cuda is None:
        to_do = (
            "install PyTorch's CUDA build, as its site describes, to use the GPU" if driver else "there is no NVIDIA driver either"
        )
        return f"PyTorch is a CPU build; {to_do}"
    build = f"PyTorch is built for CUDA {torch.version.cuda} and finds no GPU"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (driver or visible in ("", "-1")):
        return f"{build}: CUDA_VISIBLE_DEVICES='{visible}' hides them; unset it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # its message says what is wrong with the driver
        return f"{build}: {str(error).strip().splitlines()[0]}"
    return build


def nvidia_driver() -> str | None:
    """The version of NVIDIA's driver, from nvidia-smi; None where nvidia-smi does not answer."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip().splitlines()[0] if asked.returncode == 0 and asked.stdout.strip() else None


# ---- packages ----


@dataclass(frozen=True)
class Package:
    """A package that this project needs, and whether the installed version will do."""

    name: str
    version: str | None  # None: not installed
    wanted: str  # "<2.16,>=2.11"
    fits: bool


@dataclass(frozen=True)
class Extra:
    """An optional package."""

    module: str
    installed: str | None  # its version; None: not installed
    purpose: str


# Module, the distributions that may bring it, what it is used for.
EXTRAS = (
    *(
        (module, packages, f"{peer.purpose}, a peer in the benchmark")
        for peer in PEERS.values()
        for module, packages in peer.modules.items()
    ),
    ("xformers", ("xformers",), "other kernels to compare with; nothing here calls it"),
    ("matplotlib", ("matplotlib",), "the benchmark's pictures"),
    ("transformers", ("transformers",), "the tests: an independent GPT-2 and Llama"),
)


def version_of(*names: str) -> str | None:
    """The version of the first of these distributions that is installed; None where none is."""
    return next((version for version in map(installed, names) if version), None)


def packages() -> list[Package]:
    """What training needs (pyproject.toml), with the installed versions; nothing where this project is not installed."""
    try:
        wanted_here = requires(PROJECT) or []
    except PackageNotFoundError:
        return []
    found = []
    for wanted in map(Requirement, wanted_here):
        if wanted.marker is None or wanted.marker.evaluate({"extra": "train"}):
            here = version_of(wanted.name)
            fits = here is not None and wanted.specifier.contains(here, prereleases=True)
            found.append(Package(wanted.name, here, str(wanted.specifier), fits))
    return found


def extras() -> list[Extra]:
    """The optional packages, none of which is imported."""
    return [Extra(module, _extra_version(module, names), purpose) for module, names, purpose in EXTRAS]


def _extra_version(module: str, distributions: tuple[str, ...]) -> str | None:
    """The version of an optional module, "installed" where no distribution tells it; None where the module is missing."""
    parent, _, child = module.partition(".")
    spec = find_spec(parent)
    if spec is None or (child and not any((Path(place) / child).exists() for place in spec.submodule_search_locations or ())):
        return None
    return version_of(*distributions) or "installed"


def cudnn_version() -> str | None:
    """The version of PyTorch's cuDNN, "9.15.1"; None where PyTorch is built without cuDNN."""
    number = torch.backends.cudnn.version()  # 91501
    return number and f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def torch_build() -> str:
    """PyTorch's version and the platform that it is built for, "2.13.0+cpu (built for the CPU alone)"."""
    built_for = f"ROCm {torch.version.hip}" if torch.version.hip else torch.version.cuda and f"CUDA {torch.version.cuda}"
    return f"{torch.__version__} (built for {built_for or 'the CPU alone'})"


def versions() -> dict[str, str | None]:
    """Versions of the packages that a run's numbers depend on; None for one that is not installed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,  # includes what it was built for
        "cuda": torch.version.cuda,
        **{package: version_of(package) for package in PACKAGES},
    }


def compiler_trouble() -> str | None:
    """Why Triton cannot build the small C file that launches its kernels, or None."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to launch kernels and finds none: install gcc, or set CC"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's default names a folder that holds no headers
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    if not header.is_file():
        return f"Triton needs Python's headers to launch kernels, and {header} is missing: install python3-dev"
    return None


# ---- environment.json ----


def environment(device: torch.device, **about: Any) -> dict[str, Any]:
    """Where a run happens: device, versions, commit and command line, and `about`."""
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "versions": versions(),
        "commit": commit(Path(__file__).parent),
        "command": [sys.executable, *sys.argv],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **about,
    }


def commit(folder: Path) -> str | None:
    """The commit that `folder` is at, with "-dirty" where tracked files differ from it; None outside a git checkout."""
    try:
        described = subprocess.run(
            ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
