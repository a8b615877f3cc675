"""tests/kernels/test_edges.py once more, on the GPU, with flash_v3 where it runs."""

from tests.kernels.test_edges import *  # noqa: F403
