"""tests/kernels/test_flash_memory.py once more, compiled and on the GPU."""

from tests.kernels.test_flash_memory import *  # noqa: F403
