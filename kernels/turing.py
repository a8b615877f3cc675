"""Tensor cores on Turing (compute capability 7.5), which Triton dropped in version 3.3.

Since then Triton compiles `tl.dot` there to plain multiply-adds, with kilobytes of stack. This module gives a kernel Ampere's
tile layouts and Turing's instructions. Triton has a public means for each:

- the launch option arch="sm80" makes Triton compile the kernel for Ampere as far as PTX, and assemble the PTX for the GPU that is
  there;
- a hook (`knobs.runtime.add_stages_inspection_hook`) may change the stages in between. Ours keeps Ampere for the first one (TTGIR,
  whose layouts make `tl.dot` an mma), lowers the rest for Turing, and splits each mma of depth 16 into two of depth 8.

Why the split is right. PTX gives lane 4g + t of a warp these elements, two halves to a register of A and B (PTX ISA, "Matrix
Fragments for mma.m16n8k16 with floating point type" and the same of m16n8k8):

                depth 16                                            depth 8
    A   a0: row g,  k = 2t, 2t+1        a1: row g+8, same k         a0, a1 the same
        a2: row g,  k = 2t+8, 2t+9      a3: row g+8, same k
    B   b0: k = 2t, 2t+1, column g      b1: k = 2t+8, 2t+9          b0 the same
    C,D c0, c1: row g, columns 2t, 2t+1; c2, c3: row g+8            the same

So a0, a1, b0 make the product over k = 0..7 and a2, a3, b1 the one over k = 8..15, each in the layout of depth 8.
D = A B + C adds the second to the first. Nothing moves between lanes; the sum is rounded once more.

Only float16 works, since Turing's tensor cores have neither bfloat16 nor TensorFloat-32. Only num_stages=1 works, since Turing
has no asynchronous copies.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path

from triton import knobs

TURING = 75
AMPERE = "sm80"  # how Triton spells it in the launch option `arch`
DEPTH_16 = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
DEPTH_8 = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"

_MMA = re.compile(re.escape(DEPTH_16) + r"\s*" + r"\s*,\s*".join([r"\{([^}]*)\}"] * 4) + r"\s*;")
# Instructions that Ampere's layouts can leave behind and Turing lacks. ptxas judges all others.
_AMPERE_ONLY = re.compile(
    r"(?:^|[;{])\s*(?:@!?%\w+\s+)?"
    r"((?:mma(?!\.sync\.aligned\.m16n8k8\.row\.col\.f32\.f16\.f16\.f32\s)|wgmma|cp\.async|createpolicy|redux|mbarrier)\.[\w.:]+"
    r"|[a-z]\w*\.[\w.:]*(?:bf16|tf32|cache_hint)[\w.:]*)",
    re.MULTILINE,
)
_COPY = re.compile(r"@llvm\.nvvm\.(cp\.async[\w.]*)")  # in LLVM's terms
# Part of the cache keys of Triton 3.7 and later: another version of this file is another compiler.
_VERSION = sha256(Path(__file__).read_bytes()).hexdigest()
_ONE_AT_A_TIME = threading.RLock()


class NotOnTuring(RuntimeError):
    """A kernel lowered for Turing's tensor cores holds an instruction that Turing does not have; the message names it."""


def tensor_cores(capability: tuple[int, int] | None) -> AbstractContextManager[dict[str, str]]:
    """A context for a launch: on compute capability 7.5 it makes the kernel use tensor cores, elsewhere it does nothing.

        with tensor_cores(capability(x.device)) as options:
            kernel[grid](..., num_stages=1, **options)

    Args:
        capability: (major, minor) of the GPU, None where there is none.

    Returns:
        A context that yields the options the launch must pass; none where the GPU is no Turing.

    Raises (from the launch, when it compiles):
        NotOnTuring: bfloat16 or TensorFloat-32 products, or asynchronous copies (num_stages above 1).
    """
    return lowered_as_ampere(TURING) if capability == (7, 5) else nullcontext({})


@contextmanager
def lowered_as_ampere(target: int) -> Iterator[dict[str, str]]:
    """`tensor_cores` for GPUs of any compute capability (90 is 9.0), to check the split on a GPU that is at hand.

    Triton has one hook for the whole process, and other threads launch too (autograd's backward has its own). So contexts take
    turns. The hook changes only marked kernels (`stages_hook`), not what another thread compiles meanwhile. An earlier hook keeps
    working, and is back afterwards.

    The mark also keeps the caches right. `arch` belongs to the key of every kernel, in memory and on disk, so a kernel lowered
    this way is never taken for one that was not. Triton 3.6 does not ask the hook for a key, and need not: marked kernels are
    always compiled with the hook, and without it ptxas would refuse the mma of depth 16. (After an edit of this file, Triton 3.6's
    cache must be cleared.)
    """
    with _ONE_AT_A_TIME:
        earlier = knobs.runtime.add_stages_inspection_hook
        hook = stages_hook(target, earlier)
        knobs.runtime.add_stages_inspection_hook = hook
        try:
            yield {"arch": AMPERE}
        finally:
            if knobs.runtime.add_stages_inspection_hook is hook:  # else another hook lies on top, and its owner removes it
                knobs.runtime.add_stages_inspection_hook = earlier


def stages_hook(target: int, earlier: Callable | None = None) -> Callable:
    """A hook for Triton that lowers kernels with Ampere's layouts for `target`, and then calls `earlier`.

    It acts on marked kernels, those compiled for `target` with the option arch="sm80". Triton calls it with the backend, the
    stages of the compilation, its options and more, to let it change the stages. Since 3.7 Triton also calls it without arguments,
    for what to add to the cache's keys.
    """

    def hook(*arguments):  # noqa: ANN002, ANN202
        if not arguments:
            key, digest = earlier() if earlier else ("", "")
            return key + _VERSION, digest + _VERSION
        backend, stages, options, *_ = arguments
        if backend.target.arch == target and options.arch == AMPERE:
            make_ptx = stages["ptx"]
            stages["llir"] = lambda source, metadata: without_copies(backend.make_llir(source, metadata, options, target))
            stages["ptx"] = lambda source, metadata: in_halves(make_ptx(source, metadata))
        if earlier:
            earlier(*arguments)
        return None

    return hook


def without_copies(llir: str) -> str:
    """The LLVM IR, unchanged. Raises NotOnTuring for asynchronous copies, on which LLVM would end the process."""
    _refuse(_COPY.search(llir))
    return llir


def in_halves(ptx: str) -> str:
    """PTX with every float16 mma of depth 16 split in two of depth 8. Raises NotOnTuring for what Turing still lacks."""
    ptx = _MMA.sub(_split, ptx)
    _refuse(_AMPERE_ONLY.search(ptx))
    return ptx


def _refuse(found: re.Match | None) -> None:
    if found:
        raise NotOnTuring(
            f"a kernel for Turing's tensor cores holds {found[1]}, which Turing does not have; they take float16 products that are "
            "summed in float32, and num_stages=1"
        )


def _split(mma: re.Match) -> str:
    d, a, b, c = ([register.strip() for register in operand.split(",")] for operand in mma.groups())
    if set(d) & {*a[2:], *b[1:]}:  # the first half would overwrite what the second reads; LLVM has not been seen to write this
        return mma[0]  # and so it is refused
    return f"{_mma(d, a[:2], b[:1], c)}\n\t{_mma(d, a[2:], b[1:], d)}"


def _mma(*operands: list[str]) -> str:
    return f"{DEPTH_8} " + ", ".join("{ " + ", ".join(registers) + " }" for registers in operands) + ";"
