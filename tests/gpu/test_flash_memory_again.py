"""tests/test_flash_memory.py once more, compiled and on the GPU."""

from tests.test_flash_memory import *  # noqa: F403
