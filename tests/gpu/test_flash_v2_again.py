"""tests/kernels/test_flash_v2.py once more, compiled and on the GPU."""

from tests.kernels.test_flash_v2 import *  # noqa: F403
