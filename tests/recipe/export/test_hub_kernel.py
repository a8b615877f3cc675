"""The folder for Hugging Face's `kernels`: it loads beside the installed package, and gives the same attention."""

import ast
import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from flash_ladder import kernels
from flash_ladder.errors import UserError
from flash_ladder.export.hub_kernel import BUILD, write_hub_kernel
from flash_ladder.kernels.jit import installed
from flash_ladder.script_schema import HubKernelConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "kernel"
    write_hub_kernel(HubKernelConfig(out=str(out), version=3))
    return out


@pytest.fixture(scope="module")
def loaded(folder):
    """The folder as a module: by Hugging Face's `kernels`, or where that is not installed, as it does it. Once a process."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")  # Triton is imported already, and whether to interpret is asked again
        if installed("kernels"):  # asked so: without theirs, the name can find a folder of this repository
            return importlib.import_module("kernels").get_local_kernel(folder)
        name = json.loads((folder / BUILD / "metadata.json").read_text())["id"]
        spec = importlib.util.spec_from_file_location(name, folder / BUILD / "__init__.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def test_it_loads_beside_the_installed_package(folder, loaded):
    ours = sys.modules[f"{loaded.__name__}.ladder.operators"]
    assert Path(ours.__file__).is_relative_to(folder) and ours.NAMESPACE != kernels.operators.NAMESPACE
    assert set(loaded.__all__) <= set(dir(loaded))


@pytest.mark.parametrize("backend", ["eager", "flash_v2"])
def test_it_gives_the_same_attention(loaded, backend):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert loaded.choose(device, torch.float16, 16).backend == kernels.choose(device, torch.float16, 16).backend
    q, k, v = torch.randn(3, 1, 2, 24, 16, device=device).unbind()
    q.requires_grad_()
    right, found = (one.attention(q, k, v, is_causal=True, backend=backend) for one in (kernels, loaded))
    assert torch.equal(found, right)
    assert torch.equal(torch.autograd.grad(found.sum(), q)[0], torch.autograd.grad(right.sum(), q)[0])
    again = loaded.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, backend=backend)
    assert torch.equal(again.transpose(1, 2), right)


def test_it_needs_torch_and_triton_alone(folder):
    """What `kernels` asks of a build: imports of itself are relative."""
    taken = set()
    for path in (folder / BUILD).rglob("*.py"):
        for node in ast.parse(path.read_text()).body:  # what is imported inside a function is for a door of that name
            if isinstance(node, ast.Import):
                taken |= {one.name.partition(".")[0] for one in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                taken.add(node.module.partition(".")[0])
    assert taken - set(sys.stdlib_module_names) == {"torch", "triton"}


def test_its_metadata(folder):
    said = json.loads((folder / BUILD / "metadata.json").read_text())
    assert {key: said[key] for key in ("name", "version", "license", "python-depends", "backend")} == {
        "name": "flash-ladder",
        "version": 3,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    assert said["id"].startswith("flash_ladder_") and said["id"].isidentifier()
    assert "version=3" in (folder / "README.md").read_text()


def test_another_source_has_another_id(folder, tmp_path, monkeypatch):
    source = tmp_path / "kernels"
    (source / "doors").mkdir(parents=True)
    (source / "__init__.py").write_text("")
    monkeypatch.setattr(kernels, "__file__", str(source / "__init__.py"))
    write_hub_kernel(HubKernelConfig(out=str(tmp_path / "out")))
    ids = [json.loads((one / BUILD / "metadata.json").read_text())["id"] for one in (folder, tmp_path / "out")]
    assert ids[0] != ids[1]


def test_a_folder_of_ours_is_replaced_and_anybody_elses_is_not(tmp_path):
    out = tmp_path / "kernel"
    for version in (1, 2):
        write_hub_kernel(HubKernelConfig(out=str(out), version=version))
    assert json.loads((out / BUILD / "metadata.json").read_text())["version"] == 2
    (tmp_path / "theirs" / "build").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds other files than this command's \(build\)"):
        write_hub_kernel(HubKernelConfig(out=str(tmp_path / "theirs")))
    assert (tmp_path / "theirs" / "build").is_dir()
    with pytest.raises(UserError, match="out=FOLDER is missing"):
        HubKernelConfig().validate()
