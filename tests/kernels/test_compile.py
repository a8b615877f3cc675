"""The rungs' kernels compiled ahead of time for every generation, without a GPU, and held to its limits.

For each capability a process of its own compiles them: this one interprets them. Every row of every table of tiles is compiled for
every kernel; the GPUs that share a table (80 with 100; 86, 89 and 120; and all of them for flash_v1) share its rows. Head dims
between rows, padded ones and other meanings than causal are sampled.
"""

import json
import os
import subprocess
import sys

import pytest

# Shared memory that one block may have, KiB.
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# RUNG/MEANING/HEAD_DIM for each capability, in the dtype that its tensor cores are at their best in.
V2_ROWS = ["flash_v2/causal/64", "flash_v2/causal/128", "flash_v2/causal/256"]
V1_ROWS = ["flash_v1/causal/64", "flash_v1/causal/128", "flash_v1/causal/256"]
CONFIGURATIONS = {
    75: [*V1_ROWS, *V2_ROWS, "flash_v1/everything/128"],
    80: [*V1_ROWS, *V2_ROWS, "flash_v2/window/128"],
    86: [*V2_ROWS, "flash_v1/documents/128"],
    89: ["flash_v2/causal/128", "flash_v1/causal/64"],
    90: [*V1_ROWS, *V2_ROWS, "flash_v2/everything/64", "flash_v2/full/64", "flash_v2/window/128"],
    100: [*V2_ROWS, "flash_v1/causal/128"],
    120: ["flash_v2/causal/128", "flash_v1/causal/64"],
}
OTHER_HEAD_DIMS = [f"{rung}/causal/{head_dim}" for rung in ("flash_v1", "flash_v2") for head_dim in (40, 192)]
KERNELS_OF = {"flash_v1": 2, "flash_v2": 3, "flash_v3": 2}
FLASH_V3 = [
    *(f"flash_v3/{meaning}/{head_dim}" for meaning in ("causal", "full", "window") for head_dim in (64, 128)),
    *("flash_v3/slopes/64", "flash_v3/slopes/128", "flash_v3/documents/128", "flash_v3/causal/256"),
]

# A folder with the oldest Triton that the kernels are written for: pip install --no-deps --target FOLDER triton==3.6.0
OLDEST_TRITON = os.environ.get("OLDEST_TRITON")


def compiled(capability: int, dtype: str, configurations: list[str], triton: str | None = None) -> list[dict]:
    """What the machine code says, compiled by the installed Triton or by that in a folder."""
    command = [sys.executable, "-m", "tests.helpers.aot", str(capability), dtype, *configurations]
    path = os.pathsep.join(filter(None, (triton, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    results = [json.loads(line) for line in run.stdout.splitlines()]
    found = {f"{result['kernel'].split()[0]}/{result['meaning']}/{result['head_dim']}" for result in results}
    assert found == set(configurations) and len(results) >= sum(KERNELS_OF[asked.split("/")[0]] for asked in configurations)
    return results


def allowed_spills(result: dict) -> int:
    """None, but for one kernel that is 2.6 times as fast as with the best tile that spills nothing (docs/log.md)."""
    return 80 if (result["kernel"], result["capability"], result["head_dim"]) == ("flash_v2 dkdv", 90, 256) else 0


def beyond(results: list[dict]) -> list[str]:
    """Those that do not fit into shared memory, spill in an inner loop, or leave the tensor cores idle."""
    return [
        "{kernel} {meaning} {head_dim}: {shared_kib} KiB, {loop_spills} spills, {tensor_core} tensor-core products".format(**result)
        for result in results
        if result["shared_kib"] > SHARED_KIB[result["capability"]]
        or result["loop_spills"] > allowed_spills(result)
        or result["tensor_core"] == 0
    ]


@pytest.mark.parametrize("capability", CONFIGURATIONS)
def test_limits(capability):
    dtype = "float16" if capability == 75 else "bfloat16"
    assert beyond(compiled(capability, dtype, CONFIGURATIONS[capability])) == []


def test_other_head_dims():
    """Smaller than a row's and padded to it, by a GPU with enough shared memory for every table."""
    assert beyond(compiled(80, "bfloat16", OTHER_HEAD_DIMS)) == []


def test_float32():
    """Three TensorFloat-32 products for one up to head_dim 128, plain float32 beyond; in the smallest shared memory it meets."""
    for result in compiled(
        86, "float32", ["flash_v2/causal/64", "flash_v2/causal/128", "flash_v1/causal/128", "flash_v1/causal/256"]
    ):
        assert result["shared_kib"] <= SHARED_KIB[86], result
        assert (result["tensor_core"] > 0) == (result["head_dim"] <= 128), result
        if result["head_dim"] <= 128:
            assert result["loop_spills"] == 0, result


@pytest.mark.parametrize(
    "triton",
    [
        pytest.param(None, id="installed"),
        pytest.param(OLDEST_TRITON, id="oldest", marks=pytest.mark.skipif(not OLDEST_TRITON, reason="OLDEST_TRITON is not set")),
    ],
)
def test_flash_v3(triton):
    """Every setting fits Hopper, moves tiles by TMA and registers from the producer to the consumers, and has a clean steady loop.

    Where an assembler finds too few registers for products in flight it waits after each of 16, 24 or 40.
    """
    for result in compiled(90, "bfloat16", FLASH_V3, triton):
        assert triton is None or result["triton"].startswith("3.6."), result
        assert result["shared_kib"] <= SHARED_KIB[90] and result["tensor_core"] >= 48 and result["tma"] >= 8, result
        assert any(moves <= set(result["register_moves"]) for moves in ({240, 24}, {160, 32}, {216, 64, 24})), result
        assert result["steady_spills"] <= steady_spills(result), result
        assert result["overwritten"] == 0, result
        assert result["steady_waits"] <= (4 if result["kernel"] == "flash_v3 backward" else 2), result


def steady_spills(result: dict) -> int:
    """How much a steady loop may spill: nothing, but in the backward at head_dim 256. No score here is bent by a softcap."""
    return 3 if (result["kernel"], result["head_dim"]) == ("flash_v3 backward", 256) else 0


def test_the_reader_sees_an_overwritten_factor():
    """R4 to R7 are read until the wait that leaves none running, and the next round's product reads them again."""
    from tests.helpers.aot import overwritten

    product, other = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0", "HGMMA.64x64x16.F32 R64, gdesc[UR4], R64, gsb0"
    waits = ["WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    for write in ("FADD R7, R1, R2", "@P0 LDS.128 R1, [R9]", "IMAD.WIDE R3, R1, R2, R5"):
        assert overwritten([product, waits[1], write]) == []
        assert overwritten([product, other, waits[0], write]) == []
        assert len(overwritten([product, write, waits[1]])) == len(overwritten([product, waits[0], write, waits[1]])) == 2
        assert len(overwritten([write, product])) == 1
    assert overwritten([product, "FADD R8, R4, R5", "STS [R4], R5", "ISETP.GE.AND P0, PT, R4, R5, PT"]) == []
    assert len(overwritten([product, "SHFL.IDX PT, R5, R1, R2, R3", waits[1]])) == 2


def test_the_reader_finds_the_steady_loops():
    """Of three loops with as many products the two shortest, for two consumers: the third also masks."""
    from tests.helpers.aot import matrix_loops, steady_loops

    loop = "/*00{}0*/ HGMMA R0 ;\n/*00{}4*/ {} ;\n/*00{}8*/ {} ;\n/*00{}c*/ @P0 BRA 0x{}0 ;\n"
    masked = loop.format(1, 1, "LDL R4, [R1]", 1, "ISETP P0", 1, 1) + "/*0020*/ NOP ;\n"
    first, second = (f"/*00{i}0*/ HGMMA R0 ;\n/*00{i}4*/ {{}} ;\n/*00{i}8*/ @P0 BRA 0x{i}0 ;\n" for i in (3, 4))
    assert steady_loops(matrix_loops(masked + first.format("NOP") + second.format("STL [R1], R4")), 2) == [
        ["HGMMA R0 ", "NOP ", "@P0 BRA 0x30 "],
        ["HGMMA R0 ", "STL [R1], R4 ", "@P0 BRA 0x40 "],
    ]


def test_the_reader_sees_spills():
    """A loop over matrix products with a local load in it counts; the same load outside does not."""
    from tests.helpers.aot import loop_spills, matrix_loops

    loop = "/*0010*/ HMMA.16816.F32 R0, R1, R2, R0 ;\n/*0020*/ {} ;\n/*0030*/ @P0 BRA 0x10 ;\n/*0040*/ {} ;\n"
    assert loop_spills(matrix_loops(loop.format("LDL R4, [R1]", "NOP"))) == 1
    assert loop_spills(matrix_loops(loop.format("NOP", "LDL R4, [R1]"))) == 0


def test_a_limit_can_be_broken():
    fits = {"capability": 75, "kernel": "", "meaning": "", "head_dim": 64, "shared_kib": 64, "loop_spills": 0, "tensor_core": 8}
    assert beyond([fits]) == []
    for change in ({"shared_kib": 64.5}, {"loop_spills": 1}, {"tensor_core": 0}):
        assert beyond([fits | change]) != []
