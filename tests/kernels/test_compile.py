"""The rungs' kernels compiled ahead of time for every generation, without a GPU, and held to its limits.

For each capability a process of its own compiles them: this one interprets them. Every row of every table of tiles is compiled for
every kernel; the GPUs that share a table (80 with 100; 86, 89 and 120; all of them for flash_v1 and in float32) share its rows.
Head dims between rows, padded ones and other meanings than causal are sampled.

torch pins a Triton of its own, so the tests must pass with each that pyproject.toml admits: `SPILLS` holds each to what was
measured with it. The installed Triton compiles everything; the folders of OTHER_TRITONS, where it is set as CI does, compile
flash_v3 and what is near its limits.
"""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

# Shared memory that one block may have, KiB.
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# RUNG/MEANING/HEAD_DIM for each capability, in its best dtype.
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
FLOAT32 = [*V1_ROWS, *V2_ROWS]
OTHER_HEAD_DIMS = [f"{rung}/causal/{head_dim}" for rung in ("flash_v1", "flash_v2") for head_dim in (40, 192)]
KERNELS_OF = {"flash_v1": 2, "flash_v2": 3, "flash_v3": 2}
FLASH_V3 = [
    *(f"flash_v3/{meaning}/{head_dim}" for meaning in ("causal", "full", "window") for head_dim in (64, 128)),
    *("flash_v3/slopes/64", "flash_v3/slopes/128", "flash_v3/documents/128", "flash_v3/causal/256"),
]

# What each minor version of Triton spills in an inner loop, where it spills anything: loads and stores of local memory. Of flash_v3
# it is a steady loop, and the worse consumer's.
SPILLS = {
    # 2.6 times as fast as with the best tile that spills nothing (docs/log.md).
    "flash_v2 dkdv causal 256 sm_90 bfloat16": {"3.6": 28, "3.7": 29, "3.8": 29, "3.9": 64},
    # Not the assembler: 3.8's code spills as much with those of 3.7 and 3.9, and 3.9's code spills nothing with 3.8's. Nobody has
    # timed this tile, and on the other Tritons it spills nothing.
    "flash_v2 forward causal 128 sm_120 bfloat16": {"3.8": 4},
    # Nobody has timed the tiles of float32 either. At 256 its products are plain multiplications and additions, and 3.9 needs 255
    # registers for flash_v1's forward where 3.8 takes 80.
    "flash_v1 backward causal 64 sm_86 float32": {"3.6": 6, "3.7": 4, "3.8": 66, "3.9": 4},
    "flash_v1 forward causal 256 sm_86 float32": {"3.9": 75},
    "flash_v1 backward causal 256 sm_86 float32": {"3.9": 381},
    "flash_v2 dq causal 128 sm_86 float32": {"3.7": 1, "3.8": 1},
    "flash_v2 dq causal 256 sm_86 float32": {"3.6": 122, "3.7": 119, "3.8": 119, "3.9": 119},
    # Causal: 3.8's code, with CUDA 12.8's assembler too; full: CUDA 12.9's assembler, of 3.7's code too. dS swizzled over 32 or 64
    # bytes spills as much there, and on 3.6 it is slower (docs/log.md).
    "flash_v3 backward causal 128 sm_90 bfloat16": {"3.8": 2},
    "flash_v3 backward full 128 sm_90 bfloat16": {"3.8": 1},
    "flash_v3 backward causal 256 sm_90 bfloat16": {"3.9": 1},
    "flash_v3 backward causal 256 sm_90 bfloat16 deterministic": {"3.9": 3},
}
# The releases that the table was measured with: on them its numbers are exact.
MEASURED = (
    "3.6.0",  # torch 2.11 brings it
    "3.7.0",  # torch 2.12.0; the kernels nearest to their limits, which spill what 3.7.1's do
    "3.7.1",  # torch 2.12.1 and 2.13
    "3.8.0",  # torch 2.14
    "3.9.0",  # torch 2.15
)

# Folders with other Tritons than the installed one, separated as in PYTHONPATH: pip install --no-deps --target FOLDER triton==3.6.0
OTHER_TRITONS = [folder for folder in os.environ.get("OTHER_TRITONS", "").split(os.pathsep) if folder]
# What these compile of flash_v1 and flash_v2 (test_near_limits), by capability and dtype, and of flash_v3 (test_flash_v3).
NEAR_LIMITS = {
    (75, "float16"): ["flash_v1/causal/64", "flash_v1/causal/128"],
    (80, "bfloat16"): ["flash_v1/causal/40", "flash_v1/causal/128", "flash_v2/causal/128"],
    (86, "bfloat16"): ["flash_v2/causal/128"],
    (86, "float32"): ["flash_v1/causal/64", "flash_v1/causal/256", "flash_v2/causal/128", "flash_v2/causal/256"],
    (90, "bfloat16"): ["flash_v1/causal/64", "flash_v2/causal/256", "flash_v2/window/128"],
    (120, "bfloat16"): ["flash_v1/causal/64", "flash_v2/causal/128"],
}
FLASH_V3_SAMPLE = [f"flash_v3/{of}" for of in ("causal/64", "causal/128", "causal/256", "full/128", "window/64", "documents/128")]


def compiled(capability: int, dtype: str, configurations: list[str], folder: str | None = None) -> list[dict]:
    """What the machine code says, compiled by the installed Triton or by that in a folder."""
    command = [sys.executable, "-m", "tests.helpers.aot", str(capability), dtype, *configurations]
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    results = [json.loads(line) for line in run.stdout.splitlines()]
    found = {f"{result['kernel'].split()[0]}/{result['meaning']}/{result['head_dim']}" for result in results}
    assert found == set(configurations) and len(results) >= sum(KERNELS_OF[asked.split("/")[0]] for asked in configurations)
    assert folder is None or {result["triton"] for result in results} == {version_in(folder)}
    return results


def best_dtype(capability: int) -> str:
    """The dtype that a GPU's tensor cores are at their best in."""
    return "float16" if capability == 75 else "bfloat16"


def version_in(folder: str) -> str:
    """The version of the Triton in a folder, as pip has written it there."""
    (found,) = Path(folder).glob("triton-*.dist-info")
    return found.name.removeprefix("triton-").removesuffix(".dist-info")


def minor(version: str) -> str:
    """3.8 of 3.8.0."""
    return ".".join(version.split(".")[:2])


def row(result: dict) -> str:
    """Where SPILLS has this kernel."""
    name = "{kernel} {meaning} {head_dim} sm_{capability} {dtype}".format(**result)
    return f"{name} deterministic" if result.get("deterministic") else name


def spills(result: dict) -> int:
    """What SPILLS counts of a kernel."""
    return result["steady_spills" if result["kernel"].startswith("flash_v3") else "loop_spills"]


def as_measured(result: dict) -> bool:
    """Whether a kernel spills what SPILLS says: no more, and no less either, so that no number outlives its reason.

    A release that nobody has measured may spill less than its minor version does.
    """
    allowed = SPILLS.get(row(result), {}).get(minor(result["triton"]), 0)
    return spills(result) == allowed or (result["triton"] not in MEASURED and spills(result) < allowed)


def beyond(results: list[dict]) -> list[str]:
    """Those that do not fit into shared memory, spill in an inner loop what SPILLS does not say, or leave the tensor cores idle."""
    return [
        f"{row(result)}, triton {result['triton']}: {result['shared_kib']} KiB, {spills(result)} spills, "
        f"{result['tensor_core']} tensor-core products"
        for result in results
        if result["shared_kib"] > SHARED_KIB[result["capability"]]
        or not as_measured(result)
        or (result["tensor_core"] > 0) != on_tensor_cores(result)
    ]


def on_tensor_cores(result: dict) -> bool:
    """Three TensorFloat-32 products for one of float32 up to head_dim 128; plain float32 beyond."""
    return result["dtype"] != "float32" or result["head_dim"] <= 128


@pytest.mark.parametrize("capability", CONFIGURATIONS)
def test_limits(capability):
    assert beyond(compiled(capability, best_dtype(capability), CONFIGURATIONS[capability])) == []


def test_other_head_dims():
    """Smaller than a row's and padded to it, by a GPU with enough shared memory for every table."""
    assert beyond(compiled(80, "bfloat16", OTHER_HEAD_DIMS)) == []


def test_float32():
    """In the smallest shared memory that float32 meets."""
    assert beyond(compiled(86, "float32", FLOAT32)) == []


OTHERS = [pytest.param(folder, id=version_in(folder)) for folder in OTHER_TRITONS] or [
    pytest.param(None, id="others", marks=pytest.mark.skip(reason="OTHER_TRITONS is not set"))
]


@pytest.mark.parametrize("folder", OTHERS)
def test_near_limits(folder):
    """flash_v1 and flash_v2 on the other Tritons: what SPILLS names, and most of what keeps numbers in local memory elsewhere.

    Left out are kernels with registers to spare, and those that another GPU or meaning stands for, as 86 does for 89.
    """
    for (capability, dtype), configurations in NEAR_LIMITS.items():
        assert beyond(compiled(capability, dtype, configurations, folder)) == []


@pytest.mark.parametrize("folder", [pytest.param(None, id="installed"), *OTHERS])
def test_flash_v3(folder):
    """Every setting fits Hopper, moves tiles by TMA and registers from the producer to the consumers, and has a clean steady loop.

    Where an assembler finds too few registers for products in flight it waits after each of 16, 24 or 40. The installed Triton
    compiles all, and so does 3.6, whose machine code the README's figures are of; the others a sample of head dims and meanings.
    """
    everything = folder is None or minor(version_in(folder)) == "3.6"
    results = compiled(90, "bfloat16", FLASH_V3 if everything else FLASH_V3_SAMPLE, folder)
    assert beyond(results) == []
    for result in results:
        assert result["tensor_core"] >= 48 and result["tma"] >= 8, result
        assert any(moves <= set(result["register_moves"]) for moves in ({240, 24}, {160, 32}, {216, 64, 24})), result
        assert result["overwritten"] == 0, result
        assert result["steady_waits"] <= (4 if result["kernel"] == "flash_v3 backward" else 2), result


def test_every_triton_is_measured():
    """All minor versions that pyproject.toml admits; where others are at hand beside the installed one, they are all at hand."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    first, beyond_last = map(int, re.search(r'"triton>=3\.(\d+),<3\.(\d+)', text).groups())
    admitted = {f"3.{number}" for number in range(first, beyond_last)}
    assert {minor(version) for version in MEASURED} == admitted
    assert not OTHER_TRITONS or {minor(v) for v in (metadata.version("triton"), *map(version_in, OTHER_TRITONS))} == admitted


def test_every_row_is_compiled():
    """No number of SPILLS goes unchecked, neither by the installed Triton nor by another."""
    installed = {(c, best_dtype(c)): asked for c, asked in CONFIGURATIONS.items()} | {(86, "float32"): FLOAT32}
    for name in SPILLS:
        rung, _, meaning, head_dim, generation, dtype = name.split()[:6]
        place, asked = (int(generation.removeprefix("sm_")), dtype), f"{rung}/{meaning}/{head_dim}"
        assert asked in (FLASH_V3 if rung == "flash_v3" else installed[place]), name
        assert asked in (FLASH_V3_SAMPLE if rung == "flash_v3" else NEAR_LIMITS[place]), name


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


FITS = {
    "triton": "3.8.0", "capability": 120, "dtype": "bfloat16", "kernel": "flash_v2 dq", "meaning": "causal", "head_dim": 128,
    "shared_kib": 99, "loop_spills": 0, "steady_spills": 0, "tensor_core": 8,
}  # fmt: skip


def test_a_limit_can_be_broken():
    assert beyond([FITS]) == []
    for change in ({"shared_kib": 99.5}, {"loop_spills": 1}, {"tensor_core": 0}, {"dtype": "float32", "head_dim": 256}):
        assert beyond([FITS | change]) != []


def test_a_kernel_spills_what_was_measured():
    """One more is too much, and one less leaves the table's number without a reason, but on a release that nobody has measured."""
    forward = FITS | {"kernel": "flash_v2 forward", "loop_spills": SPILLS["flash_v2 forward causal 128 sm_120 bfloat16"]["3.8"]}
    assert as_measured(forward)
    for change in (-1, 1):
        assert not as_measured(forward | {"loop_spills": forward["loop_spills"] + change})
        assert as_measured(forward | {"loop_spills": forward["loop_spills"] + change, "triton": "3.8.1"}) == (change < 0)
    for elsewhere in ({"triton": "3.9.0"}, {"capability": 86}, {"dtype": "float16"}, {"meaning": "full"}, {"head_dim": 64}):
        assert not as_measured(forward | elsewhere) and as_measured(forward | elsewhere | {"loop_spills": 0})


def test_flash_v3_spills_in_a_steady_loop():
    """Its other loops are left aside, and a deterministic backward is not held to the other's number."""
    backward = FITS | {"kernel": "flash_v3 backward", "capability": 90, "deterministic": False, "loop_spills": 100}
    assert not as_measured(backward) and as_measured(backward | {"steady_spills": 2})
    assert as_measured(backward | {"deterministic": True}) and not as_measured(
        backward | {"deterministic": True, "steady_spills": 2}
    )
