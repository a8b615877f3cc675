"""Compiled on a GPU, interpreted without one.

Triton's interpreter runs a kernel in NumPy on the CPU, for checking. Triton must be told when it is imported, so it is told here,
before any kernel is defined: where there is no GPU, unless TRITON_INTERPRET says otherwise.
"""

import os
import sys

import torch

if "TRITON_INTERPRET" in os.environ:
    INTERPRET, TOO_LATE = os.environ["TRITON_INTERPRET"] == "1", False
else:
    INTERPRET = not torch.cuda.is_available()
    TOO_LATE = INTERPRET and "triton" in sys.modules  # somebody else has imported Triton to compile, and it stays so
    if INTERPRET and not TOO_LATE:
        os.environ["TRITON_INTERPRET"] = "1"


def interpreter_trouble() -> str | None:
    """Why kernels cannot run on CPU tensors in this process, or None where the interpreter is ready."""
    if TOO_LATE:
        return "Triton was imported before kernels; import kernels first or set TRITON_INTERPRET=1"
    return None if INTERPRET else "Triton compiles here, and runs on the CPU only with TRITON_INTERPRET=1"
