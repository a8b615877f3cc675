"""The attention benchmark itself: what it decides, measures on a CPU, keeps when interrupted, and says when something fails."""

import contextlib
import inspect
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import flash_ladder.benchmark.accuracy as accuracy
import flash_ladder.benchmark.grid as module
from flash_ladder.benchmark.accuracy import measure_error, yardstick
from flash_ladder.benchmark.grid import ON_CPU, ON_GPU, benchmark, complete, measure_cell
from flash_ladder.benchmark.result import Cell, Masked, Panel, read
from flash_ladder.composition import store_defaults
from flash_ladder.errors import UserError
from flash_ladder.kernels import BACKENDS
from flash_ladder.measure.growth import growth
from flash_ladder.script_schema import BenchmarkConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CAUSAL = Panel(True, 32, None)
SCRIPTS = Path(__file__).parents[3] / "scripts"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def small(**changes) -> BenchmarkConfig:
    values = dict(backends=["eager", "flash_v2"], seq_len=[64, 128], memory_seq_len=[512, 1024], causal=[True], error_seq_len=64)
    return BenchmarkConfig(**{**values, **changes})


# ---- a run on a CPU ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small grid measured for real, and what it printed."""
    folder = tmp_path_factory.mktemp("benchmark")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(torch.cuda, "is_available", lambda: False)
        result = benchmark(small(out=str(folder / "r.json"), plot=str(folder / "r.png")))
    return result, folder, printed.getvalue()


def test_memory_of_eager_grows_with_the_square_and_of_a_rung_with_the_length(run):
    result = run[0]
    eager, rung = (growth(result.sequence_bytes(CAUSAL, backend)) for backend in ("eager", "flash_v2"))
    assert eager.exponent == pytest.approx(2, abs=0.15) and eager.lengths == (128, 512, 1024)
    assert rung.exponent == pytest.approx(1, abs=0.05) and rung.lengths == (64, 128)


def test_a_rungs_error_is_of_eagers_size(run):
    eager, rung = run[0].errors
    for name in ("output", "dq", "dk", "dv"):
        assert 1e-9 < getattr(rung, name) <= 2 * getattr(eager, name) < 1e-5


def test_what_it_says_and_writes(run):
    result, folder, printed = run
    assert read(folder / "r.json") == result and result.finished
    assert (folder / "r_memory.png").is_file() and (folder / "r_error.png").is_file() and not (folder / "r.png").exists()
    assert "no GPU: speed is not measured" in printed and "too slow in Triton's interpreter" in printed
    assert f"figures in {folder / 'r.json'}" in printed and "r_memory.png" in printed
    assert result.config["masks"] and not result.masks and not result.host_us  # a CPU's times are not taken
    assert result.device == "CPU" and result.torch == torch.__version__ and result.date
    assert str(folder) not in (folder / "r.json").read_text()


def test_an_earlier_run_shown_again(run, capsys):
    folder = run[1]
    benchmark(BenchmarkConfig(read=str(folder / "r.json")))
    printed = capsys.readouterr().out
    assert "causal D=32 S=64 B=4" in printed and "Growth of memory" in printed and "Error against float64" in printed


def test_an_interrupted_run_keeps_what_it_has(monkeypatch, tmp_path, capsys):
    def interrupted(cfg, backend, panel, seq_len, device):
        if seq_len == 128:
            raise KeyboardInterrupt
        return Cell(backend, panel.head_dim, seq_len, panel.causal, peak_gib=1.0)

    monkeypatch.setattr(module, "measure_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark(small(out=str(tmp_path / "r.json")))
    kept = read(tmp_path / "r.json")
    assert [cell.backend for cell in kept.cells] == ["eager", "flash_v2"] and not kept.finished
    assert "figures so far in" in capsys.readouterr().out


def test_a_run_interrupted_among_the_masks_keeps_them(monkeypatch, tmp_path, capsys):
    def interrupted(cfg, device, next_is):
        next_is("window_8")
        yield Masked("window_8", "flash_v2", 32, 64, 0.5, 1.0, 2.0, 1.0, 2.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "complete", lambda cfg, device: (complete(cfg, GPU)[0], {}))
    monkeypatch.setattr(module, "measure_masks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark(small(seq_len=[], memory_seq_len=[], head_dim=[16], width=16, dtype="float32", out=str(tmp_path / "r.json")))
    kept = read(tmp_path / "r.json")
    assert [masked.mask for masked in kept.masks] == ["window_8"] and not kept.finished
    assert "figures so far in" in capsys.readouterr().out


def test_masks_alone(monkeypatch, tmp_path, capsys):
    """No cell and no error: nothing of the grid is measured, and what is shown has no empty table."""
    found = Masked("window_8", "flash_v2", 32, 64, 0.5, 1.0, 2.0, 1.0, 2.0)
    monkeypatch.setattr(module, "complete", lambda cfg, device: (complete(cfg, GPU)[0], {}))
    monkeypatch.setattr(module, "measure_masks", lambda cfg, device, next_is: iter([found]))
    files = dict(out=str(tmp_path / "r.json"), plot=str(tmp_path / "r.png"))
    result = benchmark(small(seq_len=[], memory_seq_len=[], head_dim=[16], width=16, dtype="float32", **files))
    assert result.masks == [found] and not result.cells and not result.errors and read(tmp_path / "r.json") == result
    benchmark(BenchmarkConfig(read=files["out"]))
    printed = capsys.readouterr().out
    assert printed.count("window_8") == 2 and "shape" not in printed and "pictures: none" in printed


def test_a_folder_that_is_not_there(tmp_path):
    for key in ("out", "plot"):
        with pytest.raises(UserError, match="there is no folder"):
            benchmark(small(**{key: str(tmp_path / "none" / "a.png")}))


def test_a_picture_that_cannot_be_written(run, tmp_path):
    (tmp_path / "a_memory.png").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        benchmark(BenchmarkConfig(read=str(run[1] / "r.json"), plot=str(tmp_path / "a.png")))


# ---- what is decided ----


def test_a_cpu_has_small_sizes_and_the_rungs():
    cfg, left_out = complete(BenchmarkConfig(), CPU)
    assert cfg.backends == [*BACKENDS, "math"] and cfg.baseline == "eager"
    assert all(getattr(cfg, name) == value for name, value in ON_CPU.items())
    assert left_out["cudnn"] == "for a GPU" and left_out["fa4"] == "for a GPU"


def test_a_gpu_has_every_peer_that_is_installed(monkeypatch):
    monkeypatch.setattr(module, "why_not_installed", lambda name: "not installed" if name.startswith("fa4") else None)
    cfg, left_out = complete(BenchmarkConfig(head_dim=[256]), GPU)
    assert cfg.backends[-3:] == ["flex", "flash_attn", "fa3"] and left_out == {"fa4": "not installed"}
    assert cfg.baseline == "fa2" and cfg.head_dim == [256] and cfg.seq_len == ON_GPU["seq_len"] and cfg.dtype == "bfloat16"


def test_the_help_says_what_null_stands_for():
    fields = re.findall(r"((?:    # .*\n)?)    (\w+): .* = (.*)", inspect.getsource(BenchmarkConfig))
    comments = {name: above + beside for above, name, beside in fields if "None: " in above + beside}
    for name, value in ON_GPU.items():
        assert f"{value} on a GPU, {ON_CPU[name]} without one" in comments[name]
    done = subprocess.run([sys.executable, str(SCRIPTS / "benchmark_attention.py"), "--help"], capture_output=True, text=True)
    for value in [*ON_GPU.values(), *ON_CPU.values(), "_memory.png", "flash_attn.cute"]:
        assert str(value).replace(" ", "") in done.stdout.replace(" ", "")


def test_who_is_named_is_measured():
    cfg, left_out = complete(BenchmarkConfig(backends=["flash_v2", "fa4"], tokens=64), CPU)
    assert cfg.backends == ["flash_v2", "fa4"] and cfg.baseline == "flash_v2" and not left_out and cfg.tokens == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backends": ["flash_v9"]}, "backends=flash_v9 is not a choice"),
        ({"backends": ["auto"]}, "backends=auto is not a choice"),
        ({"backends": []}, r"backends=\[\] leaves nothing to measure"),
        ({"seq_len": [], "memory_seq_len": [], "masks": []}, r"seq_len=\[\], memory_seq_len=\[\] and masks=\[\] leave nothing"),
        (
            {"seq_len": [], "memory_seq_len": [], "backends": ["fa2"]},
            "masks alone, and no backend takes them; name eager",
        ),
        ({"masks": ["windw_3"]}, r"masks=windw_3 is not a choice \(window_N, documents_N, ragged_N\); did you mean window_3\?"),
        ({"masks": ["window"]}, r"masks=window is not a choice .*; did you mean window_N\?"),
        ({"masks": ["window_1.5"]}, "masks=window_1.5 is not a choice"),
        ({"masks": ["window_0"]}, "masks=window_0: its length must be at least 1"),
        ({"masks": ["documents_-1"]}, "masks=documents_-1: its length must be at least 1"),
        ({"masks": ["ragged_8", "ragged_8"]}, "names one thing twice"),
        ({"mask_seq_len": 0}, "mask_seq_len=0 must be at least 1"),
        ({"read": "r.json", "masks": []}, "masks says what to measure, and read=r.json shows a run that is done"),
        ({"baseline": "cudnn", "backends": ["fa2"]}, "baseline=cudnn is not among backends"),
        ({"head_dim": [96], "width": 2048}, "width=2048 must be a whole number of heads; width=2016 would work"),
        ({"head_dim": [64], "width": 512, "n_kv_head": [None, 3]}, "in whole groups for n_kv_head=3; width=384 would work"),
        ({"backends": ["fa2", "fa2"]}, "names one thing twice"),
        ({"read": "r.json", "backends": ["fa2"]}, "backends says what to measure, and read=r.json shows a run that is done"),
        ({"seq_len": [0]}, "seq_len=0 must be at least 1"),
        ({"memory_seq_len": [0]}, "memory_seq_len=0 must be at least 1"),
        ({"n_kv_head": [0]}, "n_kv_head=0 must be at least 1"),
        ({"error_seq_len": 0}, "error_seq_len=0 must be at least 1"),
        ({"dtype": "float64"}, "dtype=float64 is not a choice"),
        ({"plot": "a.pdf"}, "plot=a.pdf must end with .png"),
    ],
)
def test_checks(change, message):
    with pytest.raises(UserError, match=message):
        BenchmarkConfig(**change).validate()


def test_the_command_and_its_dataclass_have_the_same_masks():
    """read=... takes what differs from the dataclass for asked for."""
    store_defaults(BenchmarkConfig)
    with initialize_config_dir(str(SCRIPTS / "conf"), version_base="1.3"):
        values = compose("benchmark_attention")
    assert values.masks == BenchmarkConfig().masks and values.mask_seq_len == BenchmarkConfig().mask_seq_len


def test_masks_alone_are_nothing_on_a_cpu():
    with pytest.raises(UserError, match="leave the masks alone, which are timed on a GPU"):
        complete(BenchmarkConfig(seq_len=[], memory_seq_len=[]), CPU)
    assert complete(BenchmarkConfig(seq_len=[], memory_seq_len=[]), GPU)[0].seq_len == []


def test_what_the_machine_decides_is_checked_too():
    with pytest.raises(UserError, match="width=64 must be a whole number of heads"):
        complete(BenchmarkConfig(head_dim=[48]), CPU)


# ---- one cell ----


def decided(**changes) -> BenchmarkConfig:
    return complete(small(**changes), CPU)[0]


def test_grouped_heads():
    cell = measure_cell(decided(), "eager", Panel(True, 16, 2), 64, CPU)
    assert cell.n_kv_head == 2 and cell.peak_gib > 0 and not cell.note


def test_a_peer_that_is_not_installed_is_a_note():
    assert measure_cell(decided(), "fa4", CAUSAL, 64, CPU).note == "not installed"


def test_a_refusal_is_a_note():
    assert measure_cell(decided(), "cudnn", CAUSAL, 64, CPU).note == "refused: PyTorch has no CUDNN_ATTENTION kernel for this"


def test_no_memory_for_the_scores_is_a_result(monkeypatch):
    monkeypatch.setattr(module, "eager_may_fit", lambda layer: False)
    assert measure_cell(decided(), "eager", CAUSAL, 64, CPU).note == "out of memory: the scores alone take 0.0 GiB"
    assert measure_cell(decided(), "sdpa", CAUSAL, 64, CPU).peak_gib > 0


def test_no_backward(monkeypatch):
    monkeypatch.setattr(module, "attend_with", lambda *_: lambda query, key, value: query.detach() * 1.0)
    cell = measure_cell(decided(), "fa3", CAUSAL, 64, CPU)
    assert cell.note == "no backward" and cell.peak_gib is None


def test_a_backward_that_fails_leaves_the_forward(monkeypatch):
    """As a package does that was built with the forward alone: it says so when its backward is called."""

    class ForwardAlone(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            return query * 1.0

        @staticmethod
        def backward(ctx, grad_output):
            raise RuntimeError("this build\nhas no backward")

    cfg = decided()
    right = yardstick(cfg, CAUSAL, CPU)
    for room in (module, accuracy):
        monkeypatch.setattr(room, "attend_with", lambda *_: ForwardAlone.apply)
    cell = measure_cell(cfg, "fa3", CAUSAL, cfg.seq_len[0], CPU)
    error = measure_error(cfg, "fa3", CAUSAL, right, CPU)
    assert cell.note == error.note == "no backward: RuntimeError: this build has no backward"
    assert cell.peak_gib is None and error.output > 0 and error.dq is None
