"""tests/kernels/test_flash.py once more, compiled and on the GPU."""

from tests.kernels.test_flash import *  # noqa: F403
