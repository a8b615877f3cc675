"""tests/kernels/test_cross_entropy.py once more, on the GPU."""

from tests.kernels.test_cross_entropy import *  # noqa: F403
