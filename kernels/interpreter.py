"""A launch in Triton's interpreter, which runs kernels in NumPy where there is no GPU.

A program costs a step of Python for every operation, and hardly more for a large tile than for a small one (`tiles.interpreted`).
Two things in Triton 3.6 to 3.9 cost more than the operations themselves, and are left out here.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

_ONE_AT_A_TIME = threading.Lock()  # the interpreter keeps its state in globals


@contextmanager
def launching() -> Iterator[None]:
    """A context for one launch in the interpreter: launches take turns, and results are what Triton alone would give."""
    from triton.runtime import interpreter  # imports NumPy, which a machine with a GPU may lack

    with _ONE_AT_A_TIME:
        patch, builder = interpreter._patch_lang, interpreter.interpreter_builder
        options = builder.options
        interpreter._patch_lang = once_a_module(patch)
        # Every sum and product of integers is checked for overflow, and without `debug` the outcome is thrown away.
        builder.options = replace(options, sanitize_overflow=options.debug)
        try:
            yield
        finally:
            interpreter._patch_lang, builder.options = patch, options


def once_a_module(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Triton's `_patch_lang`, less its repetitions: it gives the names of triton.language in a function's module their meaning in
    NumPy, at the launch and again at each call of a function from a kernel.
    """
    done: dict[int, Any] = {}

    def first_time(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in done:
            done[module] = patch(function)
        return done[module]

    return first_time
