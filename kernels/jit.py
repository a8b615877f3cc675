"""Compiled on a GPU, interpreted without one.

Triton's interpreter runs a kernel in NumPy on the CPU, for checking. Triton decides whether to interpret at its own import and
again where a kernel is defined. Where there is no GPU, and unless the user has set TRITON_INTERPRET, this module imports Triton
under that variable and then takes it away again: a child process, which may have a GPU, decides for itself.
"""

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch


def installed(name: str) -> str | None:
    """A package's version, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def has_triton() -> bool:
    """Whether the package triton is there: a folder of that name without code is not."""
    found = find_spec("triton")
    return found is not None and found.origin is not None


def numpy_trouble(triton: str | None, numpy: str | None) -> str | None:
    """Why Triton's interpreter cannot run with this NumPy, or None.

    Triton 3.6's interpreter uses one-element arrays as numbers, which numpy 2.4 no longer allows.
    """
    if numpy is None:
        return "Triton's interpreter needs numpy, which is not installed"
    if triton and triton.startswith("3.6.") and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        return f"Triton 3.6's interpreter needs numpy below 2.4, not {numpy}; a newer Triton would do too"
    return None


NUMPY = installed("numpy")
NUMPY_TROUBLE = numpy_trouble(installed("triton"), NUMPY)  # computed at import: torch 2.11's torch.compile cannot trace it

if "TRITON_INTERPRET" in os.environ:
    INTERPRET, TOO_LATE = os.environ["TRITON_INTERPRET"] == "1", False
else:
    # The number of GPUs, unlike torch.cuda.is_available, is known without starting CUDA, which a forked child could not use then.
    INTERPRET = torch.cuda.device_count() == 0 and NUMPY is not None  # Triton's interpreter imports NumPy at once
    TOO_LATE = INTERPRET and "triton" in sys.modules  # Triton was imported before, to compile, and cannot be switched
    if INTERPRET and not TOO_LATE and has_triton():
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            import triton

            triton.knobs.runtime.interpret = True
        finally:
            del os.environ["TRITON_INTERPRET"]


def interpreter_trouble() -> str | None:
    """Why kernels cannot run on CPU tensors in this process, or None where the interpreter is ready."""
    if TOO_LATE:
        return "Triton was imported before flash_ladder.kernels; import flash_ladder.kernels first or set TRITON_INTERPRET=1"
    if not INTERPRET and NUMPY is not None:
        return "Triton compiles here, and runs on the CPU only with TRITON_INTERPRET=1"
    return NUMPY_TROUBLE
