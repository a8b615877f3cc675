"""The kernels as a package of their own: what a wheel holds, and that it needs nothing but torch and triton."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = "flash-ladder"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of this project, unpacked as pip does it; built from a copy, since building leaves files beside the source."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("kernels", "src"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=folder / "source", check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def needed(extra: str | None) -> set[str]:
    """The packages that this project names, for everybody (None) or for an extra."""
    found = [Requirement(line) for line in requires(PROJECT)]
    return {
        r.name
        for r in found
        if (f"extra == '{extra}'" in str(r.marker).replace('"', "'") if extra else "extra" not in str(r.marker))
    }


def test_what_is_needed():
    assert needed(None) == {"torch", "triton"}
    assert {"lightning", "hydra-core", "omegaconf", "wandb", "datasets", "packaging"} <= needed("train")


def test_the_wheel_holds_every_module(wheel):
    for folder, place in (("kernels", "flash_ladder/kernels"), ("src/flash_ladder", "flash_ladder")):
        for path in (ROOT / folder).rglob("*.py"):
            assert (wheel / place / path.relative_to(ROOT / folder)).is_file(), f"{path} is not in the wheel"
    assert not (wheel / "kernels").exists()  # that name is another project's


@pytest.mark.parametrize("numpy", [True, False], ids=["numpy", "no numpy"])
def test_the_kernels_need_torch_and_triton_alone(wheel, numpy):
    """In a process to which what training needs is as good as not installed. Triton's interpreter needs NumPy, too: without it the
    rungs say so, and the others run."""
    modules = {"hydra-core": "hydra"}
    left = {"numpy", "filelock"} if numpy else {"filelock"}  # torch's own
    program = PROGRAM.format(
        absent=sorted(modules.get(name, name) for name in needed("train") - left), site=str(wheel), rungs=["flash_v1", "flash_v2"]
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(wheel)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=wheel.parent)
    assert run.returncode == 0, run.stderr[-3000:]
    assert ("Triton's interpreter needs numpy, which is not installed; eager and sdpa can" in run.stdout) == (not numpy)


PROGRAM = """
import importlib.metadata, sys

ABSENT = {absent}
class Absent:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"{{name}} is not installed here", name=name)
sys.meta_path.insert(0, Absent())
real = importlib.metadata.version
def version(name):
    if name in ABSENT:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version

import torch, flash_ladder.kernels
from flash_ladder.kernels import Unsupported, attention
assert flash_ladder.kernels.__file__.startswith({site!r}), flash_ladder.kernels.__file__
query = torch.randn(1, 2, 40, 16, requires_grad=True)
expected = attention(query, query, query, is_causal=True, backend="eager")
for backend in ["auto", "sdpa", *{rungs}]:
    try:
        output = attention(query, query, query, is_causal=True, backend=backend)
    except Unsupported as error:
        print(error)
        continue
    torch.testing.assert_close(output, expected)
    output.sum().backward()
"""


def test_a_second_copy_in_one_process(tmp_path):
    """Under another name, as a vendored copy is: it registers operators of its own, and both give the same."""
    shutil.copytree(ROOT / "kernels", tmp_path / "vendored", ignore=shutil.ignore_patterns("__pycache__"))
    program = """
import torch, vendored
from flash_ladder import kernels
query = torch.randn(1, 2, 40, 16, requires_grad=True)
outputs = [copy.attention(query, query, query, is_causal=True, backend="flash_v2") for copy in (kernels, vendored)]
assert torch.equal(*outputs) and outputs[0].grad_fn is not None
assert {kernels.operators.NAMESPACE, vendored.operators.NAMESPACE} == {"flash_ladder_kernels", "vendored"}
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]


def test_the_example_runs():
    run = subprocess.run([sys.executable, ROOT / "examples" / "attention_alone.py"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "sdpa (CPU" in run.stdout
