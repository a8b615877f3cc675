"""tests/kernels/test_sinks.py once more, on the GPU, with flash_v3 where it runs."""

from tests.kernels.test_sinks import *  # noqa: F403
