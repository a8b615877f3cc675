"""Tensor cores on Turing: what the hook does to PTX and to Triton, and a kernel compiled through it, without a GPU.

Compiling needs a process of its own (this one interprets kernels): `python -m tests.kernels.test_turing` prints it as JSON.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_ladder.kernels.turing import (
    AMPERE,
    DEPTH_8,
    DEPTH_16,
    NotOnTuring,
    in_halves,
    lowered_as_ampere,
    stages_hook,
    tensor_cores,
)
from tests.helpers.once import made_once

PLAIN = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@triton.jit
def matmul_kernel(
    A, B, C, depth, stride_a, stride_b, stride_c, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """C [M, N] float32 = A [M, depth] B [depth, N]; M and N are multiples of the blocks."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a = tl.load(A + rows[:, None] * stride_a + k[None, :], mask=k[None, :] < depth, other=0.0)
        b = tl.load(B + k[:, None] * stride_b + cols[None, :], mask=k[:, None] < depth, other=0.0)
        acc = tl.dot(a, b, acc)
    tl.store(C + rows[:, None] * stride_c + cols[None, :], acc)


@triton.jit
def largest_kernel(X, Y):
    """Y [1] = the largest of X [128], int32: Ampere has an instruction for that, Turing has not."""
    tl.store(Y, tl.max(tl.load(X + tl.arange(0, 128))))


# ---- the PTX ----


def test_split():
    """The registers of k = 0..7 first, those of k = 8..15 on top of them."""
    mma = f"{DEPTH_16} {{ %r1, %r2, %r3, %r4 }}, {{ %r5, %r6, %r7, %r8 }}, {{ %r9, %r10 }}, {{ %r11, %r12, %r13, %r14 }};"
    first, second = in_halves(mma).split("\n")
    assert first == f"{DEPTH_8} {{ %r1, %r2, %r3, %r4 }}, {{ %r5, %r6 }}, {{ %r9 }}, {{ %r11, %r12, %r13, %r14 }};"
    assert second.strip() == f"{DEPTH_8} {{ %r1, %r2, %r3, %r4 }}, {{ %r7, %r8 }}, {{ %r10 }}, {{ %r1, %r2, %r3, %r4 }};"


def test_a_sum_that_overwrites_its_operands_is_refused():
    with pytest.raises(NotOnTuring, match="m16n8k16"):
        in_halves(f"{DEPTH_16} {{%r1, %r2, %r3, %r4}}, {{%r5, %r6, %r1, %r8}}, {{%r9, %r10}}, {{%r1, %r2, %r3, %r4}};")


@pytest.mark.parametrize(
    "instruction",
    [
        "cp.async.cg.shared.global",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
        "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
        "cvt.rn.bf16.f32",
        "cvt.rna.tf32.f32",
        "createpolicy.fractional.L2::evict_first.b64",
        "ld.global.L1::evict_first.L2::cache_hint.b32",
        "redux.sync.add.s32",
        "mbarrier.init.shared::cta.b64",
    ],
)
@pytest.mark.parametrize("before", ["\t", "\t@%p1 ", "\t{ ", "mov.u32 %r1, 0x0; @!%p2 "])
def test_what_turing_does_not_have_is_named(before, instruction):
    with pytest.raises(NotOnTuring, match=re.escape(f"holds {instruction}, which")):
        in_halves(f"\tadd.s32 %r1, %r1, 1;\n{before}{instruction} %r1, %r2;\n")


def test_what_turing_has_passes():
    ptx = f"""
    .file 1 "/somewhere/redux.sync/bf16.py"
    // cp.async would be refused
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r5];
    {DEPTH_8} {{ %r1, %r2, %r3, %r4 }}, {{ %r5, %r6 }}, {{ %r9 }}, {{ %r1, %r2, %r3, %r4 }};
    cvt.rn.f16.f32 %rs1, %r1; ex2.approx.ftz.f32 %r1, %r1; tanh.approx.f32 %r1, %r1; shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;
    @%p1 ld.global.v4.b32 {{ %r1, %r2, %r3, %r4 }}, [ %rd1 + 0 ];
    """
    assert in_halves(ptx) == ptx


# ---- the hook and its context ----


@pytest.fixture
def knob():
    """Reads the hook that is installed; whatever a test leaves behind is removed."""
    before = knobs.runtime.add_stages_inspection_hook
    yield lambda: knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = before


@pytest.mark.parametrize("capability", [None, (7, 0), (8, 0), (8, 6), (9, 0), (12, 0)])
def test_nothing_happens_elsewhere(knob, capability):
    before = knob()
    with tensor_cores(capability) as options:
        assert options == {} and knob() is before


def test_installed_for_the_launch_only(knob):
    before = knob()
    with tensor_cores((7, 5)) as options:
        assert options == {"arch": AMPERE}
        outer = knob()
        assert outer is not before
        with tensor_cores((7, 5)):
            assert knob() is not outer
        assert knob() is outer
    assert knob() is before


def test_a_failing_launch_restores(knob):
    before = knob()
    with pytest.raises(ZeroDivisionError), tensor_cores((7, 5)):
        1 / 0  # noqa: B018
    assert knob() is before
    with tensor_cores((7, 5)):  # nor is the lock still held
        pass


def test_a_hook_installed_meanwhile_stays(knob):
    def theirs(*arguments):
        return "", ""

    with tensor_cores((7, 5)):
        knobs.runtime.add_stages_inspection_hook = theirs
    assert knob() is theirs


def test_threads_take_turns(knob):
    before, inside, seen = knob(), threading.Event(), []

    def other():
        inside.wait()
        with tensor_cores((7, 5)):
            seen.append(knob())

    thread = threading.Thread(target=other)
    with tensor_cores((7, 5)):
        mine = knob()
        thread.start()
        inside.set()
        thread.join(0.05)
        assert thread.is_alive() and knob() is mine
    thread.join()
    assert knob() is before and seen != [mine]


class Backend:
    """Stands for Triton's: its products are asynchronous copies, which only a touched kernel has refused."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def make_llir(self, source, metadata, options, capability):
        return f"call void @llvm.nvvm.cp.async.wait.group(i32 0) for {capability}"

    def stages(self, hook, lowered_as: str) -> dict:
        stages = {"llir": lambda source, metadata: "own", "ptx": lambda source, metadata: "\tcp.async.wait_group 0;"}
        hook(self, stages, SimpleNamespace(arch=lowered_as), None, int(lowered_as[2:]))
        return stages


def test_only_marked_kernels_are_touched():
    for arch, lowered_as in [(75, "sm75"), (80, "sm80"), (86, "sm86"), (90, "sm80")]:
        stages = Backend(arch).stages(stages_hook(75), lowered_as)
        assert stages["llir"]("", {}) == "own" and stages["ptx"]("", {}) == "\tcp.async.wait_group 0;"
    for stage in Backend(75).stages(stages_hook(75), AMPERE).values():
        with pytest.raises(NotOnTuring, match=r"holds cp\.async\.wait"):
            stage("", {})


def test_an_earlier_hook_still_works():
    """It sees the stages as we leave them, of every kernel, and its key goes into ours."""

    def theirs(*arguments):
        if not arguments:
            return "their key", "their hash"
        arguments[1]["ptx"] = lambda source, metadata: "theirs"

    for arch in (75, 90):
        assert Backend(arch).stages(stages_hook(75, theirs), AMPERE)["ptx"]("", {}) == "theirs"
    (key, digest), (own_key, own_digest) = stages_hook(75, theirs)(), stages_hook(75)()
    assert key == "their key" + own_key and digest == "their hash" + own_digest and own_key


# ---- a kernel compiled through it ----


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return json.loads((made_once(tmp_path_factory, "turing", compile_all) / "found.json").read_text())


def compile_all(folder):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    run = subprocess.run([sys.executable, "-m", "tests.kernels.test_turing"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    (folder / "found.json").write_text(run.stdout)


def test_tensor_cores(found):
    """The same number of products as Triton makes for Ampere, each in two halves; no stack; the hook gone afterwards."""
    turing = found["turing"]
    assert turing["target"] == "sm_75"
    assert turing["depth_16"] == 0 and turing["depth_8"] == 2 * found["ampere"]["depth_16"] > 0
    assert turing["sass"] == ["HMMA.1688.F32"] and turing["hmma"] == turing["depth_8"]
    assert turing["stack"] == 0 and turing["ffma"] < 50 < found["plain"]["ffma"]
    assert found["hook afterwards"] is None


def test_plain_turing_has_none(found):
    """What the module is for. When this fails, Triton has its own way again."""
    assert found["plain"]["hmma"] == 0


@pytest.mark.parametrize("name", ["ampere", "hopper"])
def test_other_gpus_get_the_same_bits(found, name):
    assert found[name]["digest"] == found[f"{name} inside"]["digest"]


def test_another_thread_gets_the_same_bits(found):
    """It compiles for Turing, unmarked, while the hook is installed."""
    assert found["thread"]["digest"] == found["plain"]["digest"] != found["turing"]["digest"]


def test_refusals_reach_the_caller(found):
    assert "holds cp.async." in found["stages"]
    assert "holds mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in found["bfloat16"]


def test_only_layouts_are_amperes(found):
    """Lowered for Turing from there on: a reduction of integers, one instruction on Ampere (which LLVM cannot select here)."""
    assert found["reduction"] == {"turing": False, "ampere": True}


def test_no_cache_mixes_them_up(found):
    """Compiled with and without, in either order, one disk cache: each its own. Marked but without the hook: refused, uncached."""
    plain, turing = found["plain"]["digest"], found["turing"]["digest"]
    assert found["cached"] == [plain, turing, plain, turing]
    assert found["marked without the hook"] == "PTXASError"


def test_launch(found):
    """A launch takes the option, and its in-memory cache tells the two kernels apart."""
    assert found["launched"] == ["plain", "turing", "plain", "turing", "same"]


def test_for_checking_on_other_gpus(found):
    """The split for a GPU that does have depth 16."""
    assert found["split on hopper"]["depth_16"] == 0 < found["split on hopper"]["depth_8"]
    assert found["split on hopper"]["target"] == "sm_90a"


def compiled(capability: int, dtype: str = "fp16", **options) -> "triton.compiler.CompiledKernel":
    constants = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
    types = {"A": f"*{dtype}", "B": f"*{dtype}", "C": "*fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in matmul_kernel.arg_names}
    aligned = {(position,): [["tt.divisibility", 16]] for position in range(7)}
    source = ASTSource(matmul_kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=PLAIN | options)


def reduces_at_once(capability: int, **options) -> bool:
    source = ASTSource(largest_kernel, signature={"X": "*i32", "Y": "*i32"}, constexprs={})
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=PLAIN | options)
    return "redux.sync" in kernel.asm["ptx"]


def facts(kernel) -> dict:
    ptx = kernel.asm["ptx"]
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        sass, usage = (
            subprocess.run([binaries / "cuobjdump", option, cubin.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    return {
        "digest": digest(kernel),
        "target": re.search(r"\.target (\w+)", ptx)[1],
        "depth_8": ptx.count(DEPTH_8),
        "depth_16": ptx.count(DEPTH_16),
        "sass": sorted(set(re.findall(r"HMMA\.[\w.]+", sass))),
        "hmma": sass.count("HMMA"),
        "ffma": sass.count("FFMA"),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
    }


def digest(kernel) -> str:
    return hashlib.sha256(kernel.asm["ptx"].encode()).hexdigest()


def compile_everything() -> dict:
    turing = lambda **options: compiled(75, **options)  # noqa: E731
    with tensor_cores((7, 5)) as options:
        marked = turing(**options)
        reduction = {"turing": reduces_at_once(75, **options), "ampere": reduces_at_once(80)}
        refused = {"stages": {"num_stages": 3}, "bfloat16": {"dtype": "bf16"}}
        errors = {name: error_of(lambda bad=bad: turing(**options | bad)) for name, bad in refused.items()}
    plain = turing()
    found = {name: str(error) for name, error in errors.items()} | {"reduction": reduction}
    found |= {"turing": facts(marked), "plain": facts(plain), "ampere": facts(compiled(80)), "hopper": facts(compiled(90))}
    with lowered_as_ampere(90) as options:
        found["split on hopper"] = facts(compiled(90, **options))

    cached = []
    for _ in range(2):
        cached.append(digest(turing()))
        with tensor_cores((7, 5)) as options:
            cached.append(digest(turing(**options)))
    found |= {"cached": cached, "hook afterwards": knobs.runtime.add_stages_inspection_hook}
    found["launched"] = launched()

    knobs.compilation.always_compile = True  # from here on nothing comes from the disk
    with tensor_cores((7, 5)):
        other = []
        thread = threading.Thread(target=lambda: other.append(turing()))
        thread.start()
        thread.join()
        found["thread"] = facts(other[0])
    for name, capability in {"ampere": (8, 0), "hopper": (9, 0)}.items():
        with tensor_cores(capability) as options:
            found[f"{name} inside"] = facts(compiled(10 * capability[0], **options))
    sys.stdout, kept = sys.stderr, sys.stdout  # Triton prints the PTX that ptxas refuses
    found["marked without the hook"] = type(error_of(lambda: turing(arch=AMPERE))).__name__
    sys.stdout = kept
    return found


def launched() -> list[str]:
    """The way of a real launch, up to the GPU: Triton's front end is told that a Turing is there, and only compiles."""
    import torch

    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 75, 32),
        )
    )
    a, c = torch.empty(64, 64, dtype=torch.float16), torch.empty(64, 64)
    arguments = (a, a, c, 64, 64, 64, 64, 64, 64, 32)
    kernels = []
    for _ in range(2):
        kernels.append(matmul_kernel.warmup(*arguments, grid=(1, 1), **PLAIN))
        with tensor_cores((7, 5)) as options:
            kernels.append(matmul_kernel.warmup(*arguments, grid=(1, 1), **PLAIN, **options))
    names = ["turing" if DEPTH_8 in kernel.asm["ptx"] else "plain" for kernel in kernels]
    return [*names, "same" if kernels[0] is kernels[2] and kernels[1] is kernels[3] else "compiled again"]


def error_of(attempt) -> Exception | None:
    try:
        attempt()
    except Exception as error:
        return error
    return None


if __name__ == "__main__":
    print(json.dumps(compile_everything()))
