"""flash_ladder.training.metrics: each name is there once, and nowhere else."""

import ast
from pathlib import Path

import flash_ladder.front_door
from flash_ladder.training import metrics

SOURCE = Path(flash_ladder.front_door.__file__).parent
GROUPS = ("train/", "val/", "speed/", "memory/", "energy/", "eval/")


def strings(path):
    """The string literals of a Python file but its docstrings, and the fixed parts of its f-strings."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and _says(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def _says(node):
    return bool(node.body) and isinstance(node.body[0], ast.Expr)


def test_names_are_in_groups_and_each_is_there_once():
    names = [value for name, value in vars(metrics).items() if name.isupper() and isinstance(value, str)]
    assert len(names) == len(set(names)) == 24
    assert all(name.startswith(GROUPS) for name in names)


def test_no_other_file_spells_a_name():
    spelt = {
        str(path.relative_to(SOURCE)): found
        for path in SOURCE.rglob("*.py")
        if (found := [text for text in strings(path) if text.startswith(GROUPS)])
    }
    assert list(spelt) == ["training/metrics.py"], spelt


def test_a_name_in_code_is_found_and_one_in_a_docstring_is_not(tmp_path):
    file = tmp_path / "file.py"
    file.write_text('"""val/loss"""\nx = {"speed/mfu": f"memory/{1}"}\n')
    assert list(strings(file)) == ["speed/mfu", "memory/"]
