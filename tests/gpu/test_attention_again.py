"""tests/kernels/test_operation.py once more, on the GPU."""

from tests.kernels.test_operation import *  # noqa: F403
