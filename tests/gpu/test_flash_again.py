"""tests/test_flash.py once more, compiled and on the GPU."""

from tests.test_flash import *  # noqa: F403
