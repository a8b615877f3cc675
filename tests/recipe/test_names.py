"""flash_ladder.names: its tables are the code's, and every help text has every name."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flash_ladder import kernels, names
from flash_ladder.benchmark import peers
from flash_ladder.front_door import CONF
from flash_ladder.script_schema import BenchmarkConfig

SCRIPTS = Path(__file__).parents[2] / "scripts"
TRITON = {name for name, module in kernels.BACKENDS.items() if not hasattr(module, "attend")}


def test_the_backends_are_those_of_kernels():
    assert list(names.BACKENDS) == list(kernels.BACKENDS)
    assert {name for name, backend in names.BACKENDS.items() if backend.is_kernel} == TRITON


def test_every_backend_is_an_option_of_train():
    options = {path.stem: yaml.safe_load(path.read_text()) for path in (CONF / "attention").glob("*.yaml")}
    assert options.pop("auto") is None  # the default
    assert options == {name: {"backend": name} for name in names.BACKENDS}


def test_the_peers_are_those_of_the_benchmark():
    assert tuple(names.PEERS) == tuple(peers.MAKERS)
    packages = {name for name, peer in names.PEERS.items() if peer.modules}
    assert {*names.MASKED_PEERS} == {"flex", *packages}  # PyTorch's own kernels take causality alone


def test_every_name_may_be_benchmarked():
    BenchmarkConfig(backends=[*names.BACKENDS, *names.PEERS]).validate()


@pytest.mark.parametrize("script", ["train", "evaluate", "export", "generate", "benchmark_attention"])
def test_help_has_every_name_with_its_purpose(tmp_path, script):
    path = SCRIPTS.parent / "train.py" if script == "train" else SCRIPTS / f"{script}.py"
    done = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    for name, backend in names.BACKENDS.items():
        assert [name, backend.purpose] in lines
    if script == "benchmark_attention":
        assert {*names.PEERS} <= {line[0] for line in lines if line}


def test_no_help_text_writes_the_list_itself():
    for path in [*CONF.rglob("*.yaml"), *(SCRIPTS / "conf").rglob("*.yaml")]:
        if path.parent.name == "experiment":
            continue  # an axis of a sweep picks backends, and is no list of them
        spelt = [line for line in path.read_text().splitlines() if sum(name in line for name in names.BACKENDS) > 2]
        assert not spelt, f"{path.name}: {spelt}"
