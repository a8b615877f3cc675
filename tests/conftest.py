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

# What `-m fast` leaves out: files that compile kernels, interpret large ones, simulate a Hopper GPU, or start processes.
SLOW = {
    "hopper/test_flash_v3.py",
    "hopper/test_flash_v3_faults.py",
    "kernels/test_compile.py",
    "kernels/test_door_transformers.py",
    "kernels/test_edges.py",
    "kernels/test_flash.py",
    "kernels/test_flash_memory.py",
    "kernels/test_flash_v2.py",
    "kernels/test_mutations.py",
    "kernels/test_package.py",
    "kernels/test_sinks.py",
    "kernels/test_turing.py",
    "recipe/benchmark/test_grid.py",
    "recipe/export/test_to_wandb.py",
    "recipe/sweep/test_launcher.py",
    "recipe/sweep/test_sweep.py",
    "recipe/sweep/test_to_wandb.py",
    "recipe/test_earlier_runs.py",
    "recipe/test_end_to_end.py",
    "recipe/test_other_packages.py",
    "recipe/test_scripts.py",
    "recipe/training/test_distributed.py",
    "recipe/training/test_run.py",
    "recipe/training/test_slurm.py",
    "recipe/training/test_wandb_copy.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as fast what runs anywhere and is in no slow file."""
    for item in items:
        path = item.path.relative_to(ROOT / "tests").as_posix()
        if path not in SLOW and not path.startswith("gpu/"):
            item.add_marker(pytest.mark.fast)


def pytest_configure() -> None:
    """Without Triton's interpreter a third of the tests would fail, each for the same reason: said once instead."""
    if "FLASH_LADDER_TESTS_ON_GPU" not in os.environ and (trouble := interpreter_trouble()):
        raise pytest.UsageError(f"the tests need Triton's interpreter: {trouble}")
