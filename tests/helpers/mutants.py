"""Faults planted in copies of the kernels' files."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from flash_ladder import kernels
from flash_ladder.kernels.choice import BACKENDS


class Fault(NamedTuple):
    """In `function` of a file of kernels/, `old` becomes `new`; the check of this name must notice."""

    caught_by: str
    file: str
    function: str
    old: str
    new: str


def planted(files: tuple[str, ...], fault: Fault | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Copies a rung (the last of `files`) and the files before it, which it is made of, into modules of their own, with a fault.

    Returns the rung's module, which is the backend "mutant".
    """
    for file in files:
        source = (Path(kernels.__file__).parent / f"{file}.py").read_text()
        if fault is not None and file == fault.file:
            start = source.index(f"def {fault.function}(")
            body = source[start : source.find("\n\n\n", start)]
            assert fault.old in body, "the fault no longer fits the source: move it along"
            source = source.replace(body, body.replace(fault.old, fault.new))
        path = folder / f"{mutant_name(file)}.py"
        path.write_text(with_absolute_imports(source, file, files))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
    monkeypatch.setitem(BACKENDS, "mutant", module)
    return module


def mutant_name(file: str) -> str:
    """The module name of a copy of a file of kernels/: "flash_v3/forward" -> "mutant_flash_v3_forward"."""
    return f"mutant_{file.replace('/', '_')}"


def with_absolute_imports(source: str, file: str, copied: tuple[str, ...]) -> str:
    """The source of `file` with absolute imports: from the copy where there is one, from the package elsewhere."""

    def resolved(statement: re.Match) -> str:
        dots, module, names = statement.groups()
        folder = Path(file).parents[len(dots) - 1]
        target = folder / module.replace(".", "/") if module else folder
        if str(target) in copied:
            return f"from {mutant_name(str(target))} import {names}"
        name, _, alias = names.partition(" as ")
        if str(target / name) in copied:  # `from . import MODULE as ALIAS`
            return f"import {mutant_name(str(target / name))} as {alias or name}"
        return f"from {'.'.join((kernels.__name__, *target.parts))} import {names}"

    return re.sub(r"^from (\.+)([\w.]*) import (.*)$", resolved, source, flags=re.MULTILINE)
