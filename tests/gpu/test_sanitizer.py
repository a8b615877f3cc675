"""The flash rungs read and write inside their tensors, without a race in shared memory: NVIDIA's compute-sanitizer watches."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.reference import RUNGS

KERNELS_FOLDER = Path(__file__).parents[2] / "kernels"


def compute_sanitizer() -> str | None:
    """The program on PATH or in the CUDA toolkit's bin: CUDA_HOME, or the usual place."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{folder / 'bin'}:{folder / 'compute-sanitizer'}"
    )


# Ours, by a part of their names, and none of PyTorch's, which would cost time.
KERNELS = [f"kns={name}_kernel" for name in ("forward", "backward", "dq", "dkdv", "preprocess", "postprocess", "bounds")]


# What racecheck reports of flash_v3 though it is ordered, because it does not follow mbarriers and barriers of some warps: the
# number of the next tile, and what the compiler hands to specialised warps at a kernel's start. By the text of the lines it names.
ORDERED_UNSEEN = (
    "drawn.store(",
    "= drawn.load(",
    "def forward_kernel(",
    "def backward_kernel(",
    "gl.warp_specialize(",
    "if WARPGROUPS == 2:",
)


def unexplained(report: str) -> list[str]:
    """The lines of ours that racecheck names, without those of ORDERED_UNSEEN."""
    named = sorted(set(re.findall(r"access at \S+ in (\S+\.py):(\d+)", report)))
    found = {
        name: next(KERNELS_FOLDER / folder / name for folder in ("flash_v3", "") if (KERNELS_FOLDER / folder / name).exists())
        for name, _ in named
    }
    lines = {f"{name}:{line}": found[name].read_text().splitlines()[int(line) - 1] for name, line in named}
    return [f"{where}: {text.strip()}" for where, text in lines.items() if not any(part in text for part in ORDERED_UNSEEN)]


@pytest.mark.skipif(compute_sanitizer() is None, reason="compute-sanitizer is neither on PATH nor in CUDA_HOME")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@pytest.mark.parametrize("rung", RUNGS)
def test_nothing_to_report(rung, tool):
    """PyTorch's allocator hands out pieces of larger blocks, between which memcheck would see no border: it is switched off."""
    filters = [word for name in KERNELS for word in ("--kernel-name", name)]
    command = [
        compute_sanitizer(),
        "--tool",
        tool,
        *filters,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "tests.helpers.sanitize",
        rung,
    ]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if rung == "flash_v3" and tool == "racecheck":
        assert unexplained(result.stdout) == [], result.stdout[-4000:]
    else:
        assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert f"{rung}: done" in result.stdout
