"""What every test file shares.

`python -m pytest` means the same on every machine: it runs on the CPU, a GPU hidden where there is one. `python -m pytest
tests/gpu` is for a machine with a GPU.
"""

import os
import sys
from pathlib import Path

# Test processes start as copies of the first one and have no arguments of their own: the environment tells them.
if any(Path(argument.split("::")[0]).parts[:2] == ("tests", "gpu") for argument in sys.argv[1:]):
    os.environ["FLASH_LADDER_TESTS_ON_GPU"] = "1"
if "FLASH_LADDER_TESTS_ON_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest

from flash_ladder.kernels.jit import interpreter_trouble  # before Lightning, which imports Triton

# `python -m pytest` puts the repository's root first on the path, and with it our folder kernels/ before an installed package
# `kernels`. Last is enough for `tests`. (pyproject.toml's import-mode keeps pytest from putting it first again.)
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT] + [str(ROOT)]


def pytest_configure() -> None:
    """Without Triton's interpreter a third of the tests would fail, each for the same reason: said once instead."""
    if "FLASH_LADDER_TESTS_ON_GPU" not in os.environ and (trouble := interpreter_trouble()):
        raise pytest.UsageError(f"the tests need Triton's interpreter: {trouble}")
