"""Faults planted in copies of the kernels' files."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import kernels
from kernels.attention import BACKENDS


class Fault(NamedTuple):
    """In `function` of a file of kernels/, `old` becomes `new`; the check of this name must notice."""

    caught_by: str
    file: str
    function: str
    old: str
    new: str


def planted(files: tuple[str, ...], fault: Fault | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A copy of a rung, the last of `files`, and of those before it, which it is made of, as modules of their own, with a fault.

    Returns the rung's module, which is the backend "mutant".
    """
    for file in files:
        source = (Path(kernels.__file__).parent / f"{file}.py").read_text()
        if fault is not None and file == fault.file:
            start = source.index(f"def {fault.function}(")
            body = source[start : source.find("\n\n\n", start)]
            assert fault.old in body, "the fault no longer fits the source: move it along"
            source = source.replace(body, body.replace(fault.old, fault.new))
        for other in files:
            source = source.replace(f"from kernels.{other} import", f"from mutant_{other} import")
            source = source.replace(f"from kernels import {other} as", f"import mutant_{other} as")
        path = folder / f"mutant_{file}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
    monkeypatch.setitem(BACKENDS, "mutant", module)
    return module
