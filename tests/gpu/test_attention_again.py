"""tests/test_attention.py once more, on the GPU."""

from tests.test_attention import *  # noqa: F403
