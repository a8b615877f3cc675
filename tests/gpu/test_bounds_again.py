"""tests/test_bounds.py once more, on the GPU."""

from tests.test_bounds import *  # noqa: F403
