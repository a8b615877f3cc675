"""Packages of other people whose names our files bear: Hugging Face's `kernels` and `evaluate` stay what `import` finds."""

import os
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT, ROOT / "scripts") for path in path.glob("*.py"))


@pytest.fixture
def other(tmp_path):
    """A folder with stand-ins for the packages `kernels` and `evaluate`."""
    folder = tmp_path / "other"
    for name in ("kernels", "evaluate"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"whose = 'the other {name}'\n")
    return folder


def call(script: Path, *arguments: str, other: Path, cwd: Path) -> subprocess.CompletedProcess:
    """Runs a script in a process that has the folder `other` on its path, after the script's own folder."""
    environment = os.environ | {"PYTHONPATH": str(other)}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


LIKE_TRAIN = """
from flash_ladder.front_door import front_door
from flash_ladder.schema import Config
from flash_ladder.sweep import launcher

def main(cfg, run_dir):
    import evaluate
    import kernels
    import flash_ladder.kernels
    print(kernels.whose, evaluate.whose, flash_ladder.kernels.attention.__name__, sep=", ")

if __name__ == "__main__":
    launcher.register()
    front_door("train", Config, main)
"""


def test_a_library_finds_the_installed_package_and_not_our_folder(tmp_path, other):
    """A script as train.py is, beside a folder kernels/ and an evaluate.py."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "kernels").symlink_to(ROOT / "kernels")
    (root / "evaluate.py").symlink_to(ROOT / "scripts" / "evaluate.py")
    (root / "train.py").write_text(LIKE_TRAIN)
    (tmp_path / "link").symlink_to(root)
    for script in (root / "train.py", tmp_path / "link" / "train.py"):
        done = call(script, other=other, cwd=root)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "the other kernels, the other evaluate, attention\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_script_starts_beside_another_kernels(tmp_path, other, script):
    done = call(ROOT / script, "--help", other=other, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python {script}" in done.stdout


def test_the_doctor_runs_beside_another_kernels(tmp_path, other):
    done = call(ROOT / "scripts" / "doctor.py", "device=cpu", other=other, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "flash_v2" in done.stdout


def test_the_tests_themselves_find_what_is_installed(monkeypatch, other):
    """The repository's root, which pytest needs on the path for `tests`, comes after what is installed."""
    entries = [Path(entry).resolve() for entry in sys.path]
    assert entries.index(ROOT) > entries.index(Path(sysconfig.get_paths()["purelib"]).resolve()) and entries.count(ROOT) == 1
    place = entries.index(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path[:place], str(other), *sys.path[place:]])
    # Asked of the path itself: another test may have imported a module of that name, which find_spec would tell.
    assert Path(PathFinder.find_spec("kernels").origin).parents[1] == other
