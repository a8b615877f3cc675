"""tests/kernels/test_bounds.py once more, on the GPU."""

from tests.kernels.test_bounds import *  # noqa: F403
