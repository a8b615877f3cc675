"""Imports between the rooms of src/flash_ladder and kernels/ go one way."""

import ast
import re
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
# Each room may import those before it: a file of src/flash_ladder, a folder there, or kernels/.
ORDER = (
    *("kernels", "errors", "names", "units", "memory", "files", "drawing", "processes", "screen", "stopping"),
    *("model_schema", "schema", "script_schema", "flags", "overrides", "composition", "front_door"),
    *("measure", "machine", "data", "model", "training", "export", "certify", "benchmark", "sweep"),
)


def room_of(path: Path) -> str:
    """The room that a source file lies in."""
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return path.relative_to(ROOT / "src" / "flash_ladder").parts[0].removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    """The rooms of this project that a source file names in an import, also inside a function."""
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            inside = node.module == "flash_ladder"
            modules += [f"flash_ladder.{name.name}" for name in node.names] if inside else [node.module]
    return {module.split(".")[1] for module in modules if module.startswith("flash_ladder.")}


def upward(path: Path, source: str) -> list[str]:
    """Imports of a room that comes later."""
    own = room_of(path)
    return [f"{path.name} imports {other}" for other in imported_rooms(source) if ORDER.index(other) > ORDER.index(own)]


def test_imports_go_one_way():
    sources = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "src").rglob("*.py")]
    rooms = {room_of(path) for path in sources} - {"__init__"}
    assert rooms == set(ORDER)
    assert [line for path in sources if room_of(path) in rooms for line in upward(path, path.read_text())] == []


def test_an_import_of_a_later_room_is_seen():
    path = ROOT / "src" / "flash_ladder" / "data" / "corpus.py"
    for source in (
        "from flash_ladder.training.run import train",
        "import flash_ladder.export.folder",
        "from flash_ladder import benchmark",
    ):
        assert len(upward(path, source)) == 1
        assert len(upward(path, f"def later():\n    {source}")) == 1
    assert upward(path, "from flash_ladder.files import make_writable\nimport torch\nfrom flash_ladder import kernels") == []


def test_the_lock_has_what_the_bounds_allow_with_hashes_and_names_no_host():
    lines = (ROOT / "requirements.lock").read_text().replace("\\\n", " ").splitlines()
    locked = [Requirement(line.partition(" --hash")[0]) for line in lines if line and not line.startswith("#")]
    assert all(line.startswith("#") or re.search(r" --hash=sha256:[0-9a-f]{64}$", line) for line in lines)
    assert not any("://" in line or line.startswith("-") for line in lines)
    wanted = [Requirement(line) for line in requires("flash-ladder")]
    for requirement in wanted:
        if requirement.marker is None or "dev" not in str(requirement.marker):
            name = requirement.name.replace("_", "-")
            versions = [str(one.specifier).removeprefix("==") for one in locked if one.name == name]
            assert versions and all(requirement.specifier.contains(version) for version in versions), requirement
