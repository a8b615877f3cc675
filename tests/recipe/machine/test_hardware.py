"""What a machine has: why there is no GPU, what a build has code for, which packages are there, and environment.json."""

import json

import pytest
import torch

from flash_ladder.machine import hardware as machine
from flash_ladder.machine.hardware import commit, environment, has_code_for

CPU = torch.device("cpu")


# ---- GPUs ----


@pytest.mark.parametrize(
    ("build", "visible", "driver", "words"),
    [
        ({"cuda": None}, None, None, "a CPU build; there is no NVIDIA driver either"),
        ({"cuda": None}, None, "580.65", "a CPU build; install PyTorch's CUDA build"),
        ({"cuda": "12.8"}, "", None, "CUDA_VISIBLE_DEVICES='' hides them; unset it"),
        ({"cuda": "12.8"}, "7", "580.65", "CUDA_VISIBLE_DEVICES='7' hides them"),
        ({"cuda": "12.8"}, None, None, "built for CUDA 12.8 and finds no GPU: Found no NVIDIA driver on your system"),
        ({"hip": "6.4"}, None, None, "built for ROCm and finds no AMD GPU"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, build, visible, driver, words):
    def init():
        raise RuntimeError("Found no NVIDIA driver on your system. Please check\nthat")

    for name, value in build.items():
        monkeypatch.setattr(torch.version, name, value)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert words in machine.why_no_gpu(driver)


@pytest.mark.parametrize(
    ("arch_list", "capability", "expected"),
    [
        (["sm_80", "sm_90"], (8, 9), True),
        (["sm_80", "sm_90"], (7, 5), False),
        (["sm_86"], (8, 0), False),
        (["sm_90", "compute_90"], (12, 0), True),
        (["sm_90a"], (9, 0), True),
        (["sm_100a", "sm_90"], (10, 3), False),
        (["sm_120"], (12, 1), True),
    ],
)
def test_has_code_for(arch_list, capability, expected):
    assert has_code_for(arch_list, capability) == expected


# ---- packages ----


def test_the_requirements_of_this_project_are_read():
    assert {"torch", "triton", "lightning", "numpy"} <= {package.name for package in machine.packages()}


def test_optional_packages_are_looked_for_and_not_imported(monkeypatch, tmp_path):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise SystemError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    found = {extra.module: extra.installed for extra in machine.extras()}
    assert found["flash_attn"] == "installed" and found["flash_attn.cute"] is None and found["matplotlib"][0].isdigit()
    (tmp_path / "flash_attn" / "cute").mkdir()
    assert {extra.module: extra.installed for extra in machine.extras()}["flash_attn.cute"] == "installed"


def test_a_machine_that_cannot_compile(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert "install python3-dev" in machine.compiler_trouble()
    (tmp_path / "Python.h").touch()
    assert machine.compiler_trouble() is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert "C compiler" in machine.compiler_trouble()


# ---- environment.json ----


def test_environment_says_what_the_numbers_depend_on():
    about = json.loads(json.dumps(environment(CPU, attention={"backend": "sdpa", "reason": "CPU"})))
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"]["python"] and about["versions"]["lightning"] and about["command"]
    assert about["gpu"] is None and about["attention"]["backend"] == "sdpa"


def test_commit_outside_a_checkout_is_none(tmp_path):
    assert commit(tmp_path) is None
