"""The flash rungs read and write inside their tensors, without a race in shared memory: NVIDIA's compute-sanitizer watches."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reference import RUNGS


def compute_sanitizer() -> str | None:
    """The program on PATH or in the CUDA toolkit's bin: CUDA_HOME, or the usual place."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{folder / 'bin'}:{folder / 'compute-sanitizer'}"
    )


# Ours, by a part of their names, and none of PyTorch's, which would cost time.
KERNELS = [f"kns={name}_kernel" for name in ("forward", "backward", "dq", "dkdv", "prepare", "finish")]


@pytest.mark.skipif(compute_sanitizer() is None, reason="compute-sanitizer is neither on PATH nor in CUDA_HOME")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("rung", RUNGS)
def test_nothing_to_report(rung, tool):
    """PyTorch's allocator hands out pieces of larger blocks, between which memcheck would see no border: it is switched off."""
    filters = [word for name in KERNELS for word in ("--kernel-name", name)]
    command = [compute_sanitizer(), "--tool", tool, *filters, "--error-exitcode", "9", sys.executable, "-m", "tests.sanitize", rung]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert f"{rung}: " in result.stdout
