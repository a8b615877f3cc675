"""flash_v2's kernels compiled ahead of time for every generation, without a GPU, and held to its limits.

For each capability a process of its own compiles all three kernels at every head_dim: this one interprets them.
"""

import json
import os
import subprocess
import sys

import pytest

# Shared memory that one block may have, KiB.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
HEAD_DIMS = [16, 32, 64, 128, 256]
PADDED = [40, 80, 192]


def compiled(capability: int, dtype: str, head_dims: list[int]) -> list[dict]:
    command = [sys.executable, "-m", "tests.aot", str(capability), dtype, *map(str, head_dims)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_every_head_dim(capability):
    head_dims = HEAD_DIMS + (PADDED if capability == 80 else [])
    results = compiled(capability, "bfloat16", head_dims)
    assert len(results) == 3 * len(head_dims)
    for result in results:
        assert result["shared_kib"] <= SHARED_KIB[capability], result
        assert result["tensor_core"] > 0, result
        assert result["loop_spills"] == 0, result


def test_float32():
    """Three TensorFloat-32 products for one up to head_dim 128, plain float32 beyond; in the smallest shared memory there is."""
    for result in compiled(86, "float32", [64, 128, 256]):
        assert result["shared_kib"] <= SHARED_KIB[86], result
        assert (result["tensor_core"] > 0) == (result["head_dim"] <= 128), result
        if result["head_dim"] <= 128:
            assert result["loop_spills"] == 0, result


def test_the_reader_sees_spills():
    """A loop over matrix products with a local load in it counts; the same load outside does not."""
    from tests.aot import loop_spills

    loop = "/*0010*/ HMMA.16816.F32 R0, R1, R2, R0 ;\n/*0020*/ {} ;\n/*0030*/ @P0 BRA 0x10 ;\n/*0040*/ {} ;\n"
    assert loop_spills(loop.format("LDL R4, [R1]", "NOP")) == 1
    assert loop_spills(loop.format("NOP", "LDL R4, [R1]")) == 0
