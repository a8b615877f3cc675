"""Tensor cores on Turing (compute capability 7.5), which Triton gave up in its version 3.3.

Since then `tl.dot` becomes plain multiply-adds there, with kilobytes of stack. The way back is a kernel whose tiles are laid out as
for Ampere and whose instructions are Turing's. Triton offers both halves of it in public:

- the launch option arch="sm80" makes Triton compile the kernel as Ampere's as far as PTX, where it is assembled for the GPU that
  is there;
- a hook (`knobs.runtime.add_stages_inspection_hook`) may change the stages on that way. Ours keeps Ampere for the first one (TTGIR:
  layouts, which make `tl.dot` an mma), lowers the rest for Turing, and splits the mma, of depth 16, into two of depth 8.

Why the split is right. Of a product of depth 16, PTX gives lane 4g + t of a warp (PTX ISA, "Matrix Fragments for mma.m16n8k16 with
floating point type" and the same of m16n8k8), two halves to a register of A and B:

                depth 16                                            depth 8
    A   a0: row g,  k = 2t, 2t+1        a1: row g+8, same k         a0, a1 the same
        a2: row g,  k = 2t+8, 2t+9      a3: row g+8, same k
    B   b0: k = 2t, 2t+1, column g      b1: k = 2t+8, 2t+9          b0 the same
    C,D c0, c1: row g, columns 2t, 2t+1; c2, c3: row g+8            the same

So a0, a1, b0 are the product over k = 0..7 and a2, a3, b1 that over k = 8..15, each in the layout of depth 8, and
D = A B + C is the second on top of the first. Nothing moves between lanes; the sum is rounded once more on the way.

float16 only: Turing's tensor cores know neither bfloat16 nor TensorFloat-32. And num_stages=1: it has no asynchronous copies.
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
# What Ampere's layouts can leave behind that Turing lacks. ptxas has the last word on everything else.
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
    """Around a launch: on compute capability 7.5 the kernel uses tensor cores, anywhere else nothing happens.

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
    """`tensor_cores` for GPUs of any compute capability (90 is 9.0): for checking the split on a GPU that is at hand.

    Triton's hook is one for the whole process, and other threads launch too (autograd's backward has its own). So contexts
    take turns; the hook touches only kernels that carry their mark (`stages_hook`), and a kernel that another thread compiles
    meanwhile comes out as it always does; a hook that was there before keeps working and is back afterwards.

    The mark also keeps the caches right. `arch` belongs to the key of every kernel, in memory and on disk, so one lowered this way
    is never taken for one that was not. Triton 3.6 does not ask the hook for a key, and need not: marked kernels are always
    compiled with the hook, and without it ptxas would refuse the mma of depth 16. (After an edit of this file, a Triton 3.6 wants
    its cache cleared.)
    """
    with _ONE_AT_A_TIME:
        earlier = knobs.runtime.add_stages_inspection_hook
        hook = stages_hook(target, earlier)
        knobs.runtime.add_stages_inspection_hook = hook
        try:
            yield {"arch": AMPERE}
        finally:
            if knobs.runtime.add_stages_inspection_hook is hook:  # else somebody has put theirs on top, which is theirs to remove
                knobs.runtime.add_stages_inspection_hook = earlier


def stages_hook(target: int, earlier: Callable | None = None) -> Callable:
    """A hook for Triton that makes kernels with Ampere's layouts fit for `target`, and then does what `earlier` does.

    It acts on kernels that are marked: compiled for `target` with the option arch="sm80". Triton calls it in two ways: with the
    backend, the stages of the compilation, its options, ..., to let it change the stages; since 3.7 also with nothing, for
    what to add to the cache's keys.
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
    """LLVM IR as it is. Raises NotOnTuring for asynchronous copies: LLVM would not raise but end the process."""
    _refuse(_COPY.search(llir))
    return llir


def in_halves(ptx: str) -> str:
    """PTX with every float16 mma of depth 16 split in two of depth 8. Raises NotOnTuring if that is not enough."""
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
