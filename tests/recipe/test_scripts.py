"""The scripts as a user calls them: exit codes, one line for a mistake, text as it comes, and no folder left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flash_ladder.names import BACKENDS
from tests.helpers import commands
from tests.helpers.made_up import made_up_run

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder to call from, with a run in it."""
    folder = tmp_path_factory.mktemp("here")
    made_up_run(folder)
    return folder


def call(script: str, *arguments: str, cwd: Path, first: str = "") -> subprocess.CompletedProcess:
    """Runs a script; `first` is Python that its process runs before."""
    if not first:
        return commands.run(f"scripts/{script}", *arguments, cwd=cwd)
    path = str(SCRIPTS / script)
    code = f"import runpy, sys\nsys.argv[0] = {path!r}\n{first}\nrunpy.run_path({path!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def exported(here):
    done = call("export.py", "run=run", cwd=here)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("exported to run/export\n") and "sdpa against eager" in done.stdout
    return here / "run" / "export"


def test_evaluate(here, exported):
    done = call("evaluate.py", "model=run/export", "attention=eager", "against=sdpa", "out=result.json", cwd=here)
    assert done.returncode == 0, done.stderr
    assert "attention: eager (asked for; CPU, float32, head_dim 16)" in done.stdout
    assert json.loads((here / "result.json").read_text())["within"]


WRONG_SCALE = """
import flash_ladder.kernels.eager
right = flash_ladder.kernels.eager.attend
flash_ladder.kernels.eager.attend = lambda q, k, v, asked: right(q, k, v, asked._replace(scale=2 * asked.scale))
"""


def test_a_wrong_attention_is_exit_code_1(here, exported):
    done = call("evaluate.py", "model=run/export", "attention=eager", cwd=here, first=WRONG_SCALE)
    assert done.returncode == 1, done.stderr
    assert "beyond tolerance: |Δ loss| to export (sdpa) is " in done.stdout


def test_generate(here, exported):
    prompt = "a = {'x': [1, 2]}  # ${HOME}, \"q\" \\ é\n"
    done = call("generate.py", "model=run/export", f"prompt={prompt}", "max_new_tokens=5", cwd=here)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(prompt) and len(done.stdout) > len(prompt) + 1
    assert done.stderr == "attention: sdpa (CPU, float32, head_dim 16)\n"


def test_nothing_is_left_behind(here, exported):
    assert {p.name for p in here.iterdir()} <= {"run", "text", "cache", "result.json"}
    assert not [p for p in (here / "run").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("export.py", "run=RUN is missing"),
        ("evaluate.py", "model=EXPORTED is missing"),
        ("certify.py model=x a=eager", "a=eager and b=eager are one and the same; name two"),
        ("generate.py", "model=EXPORTED is missing"),
        ("report.py", "runs=FOLDER is missing"),
        ("report.py runs=. baseline=egaer", "did you mean eager?"),
        ("report.py runs=none", "runs=none is not a folder"),
        ("report.py runs=.", "runs=. holds no run"),
        ("export.py run=run checkpoint=bset", "checkpoint=bset is not a choice (best, last, PATH.ckpt); did you mean best?"),
        ("export.py run=run windows=0", "windows=0 must be at least 1"),
        ("evaluate.py model=run/export atention=eager", "atention is not a key; did you mean attention?"),
        ("evaluate.py model=run/export attention=flash", "attention=flash is not a choice"),
        ("evaluate.py model=run/export against=egaer", "did you mean eager?"),
        ("evaluate.py model=run/export batch_size=x", "batch_size: value 'x'"),
        ("generate.py run/export", "run/export is not KEY=VALUE"),
        ("generate.py model=run/export top_k=0", "top_k=0 must be at least 1"),
        ("generate.py model=a(b)", "model=a(b) does not exist"),
        ("benchmark_attention.py backends=[fa2]", "backends=fa2 needs a GPU, and PyTorch finds none; math and"),
        ("benchmark_attention.py seq_len=[99999999999]", "the inputs would take 93.1 TiB, and this machine has"),
        ("doctor.py dtype=bf16", "dtype=bf16 is not a choice (auto, bfloat16, float16, float32, float64)"),
        ("generate.py model=none", "model=none does not exist; name a folder that scripts/export.py wrote"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, command, message):
    done = call(*command.split(" "), cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stdout == "" and not any(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["export", "evaluate", "generate"])
def test_help_lists_every_choice(tmp_path, script):
    done = call(f"{script}.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "attention: auto" in done.stdout and all(name in done.stdout for name in BACKENDS)
    assert f"python scripts/{script}.py" in done.stdout
