"""The attention benchmark where there is something to time: every figure is taken, and out of memory is a result."""

import pytest
import torch

from flash_ladder.benchmark.grid import benchmark, complete, measure_cell
from flash_ladder.benchmark.result import Panel
from flash_ladder.benchmark.timing import median_milliseconds
from flash_ladder.measure.growth import growth
from flash_ladder.measure.peak_memory import peak_bytes
from flash_ladder.script_schema import BenchmarkConfig

CAUSAL = Panel(True, 64, None)


def small(**changes) -> BenchmarkConfig:
    values = dict(
        backends=["eager", "flash_v2", "fa2", "flex"], seq_len=[1024, 2048], memory_seq_len=[4096], head_dim=[64], masks=[]
    )
    return BenchmarkConfig(
        **{**values, **dict(causal=[True], tokens=4096, width=256, milliseconds=5, error_seq_len=256), **changes}
    )


def test_a_grid(tmp_path):
    result = benchmark(small(out=str(tmp_path / "r.json"), plot=str(tmp_path / "r.png")))
    assert [cell.note for cell in result.cells] == [""] * 12 and [error.note for error in result.errors] == [""] * 4
    for cell in result.cells:
        assert cell.peak_gib > 0
        assert (cell.forward_tflops is None) == (cell.backward_tflops is None) == (cell.seq_len == 4096)
    assert growth(result.sequence_bytes(CAUSAL, "eager")).exponent > 1.7
    for backend in ("flash_v2", "fa2", "flex"):
        assert growth(result.sequence_bytes(CAUSAL, backend)).exponent == pytest.approx(1, abs=0.15)
    assert all(1 < value < 1e5 for value in result.host_us.values()) and len(result.host_us) == 4
    assert result.cudnn and result.device_gib > 1
    pictures = {f"r{what}.{end}" for what in ("", "_memory", "_error") for end in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == {"r.json"} | pictures


def test_masks():
    """A kernel that skips what a mask hides takes its share of the time, and eager attention all of it."""
    masks = ["window_2048", "documents_2048", "ragged_2048"]
    shapes = dict(seq_len=[], memory_seq_len=[], masks=masks, mask_seq_len=16384)
    skipping = benchmark(small(**shapes, backends=["flash_v2", "flex"], width=2048))
    assert not skipping.cells and not skipping.host_us and [masked.note for masked in skipping.masks] == [""] * 6
    for masked in skipping.masks:
        assert masked.area < 0.35 and 0.8 < masked.forward < 2 and 0.8 < masked.backward < 2
    for masked in benchmark(small(**shapes, backends=["eager"])).masks:
        assert 0.8 < masked.forward * masked.area < 1.3 and 0.8 < masked.backward * masked.area < 1.3


def test_out_of_memory_is_a_result():
    cfg, _ = complete(small(tokens=2**19), torch.device("cuda"))  # float32 scores of one sequence: 4 TiB
    cell = measure_cell(cfg, "eager", CAUSAL, 2**19, torch.device("cuda"))
    assert cell.note == "out of memory" and cell.peak_gib is None
    assert measure_cell(cfg, "flash_v2", CAUSAL, 1024, torch.device("cuda")).note == ""


def test_a_time():
    x = torch.randn(4096, 4096, device="cuda")
    one, ten = (median_milliseconds(lambda: None, lambda _, n=n: [x @ x for _ in range(n)], 20) for n in (1, 10))
    assert 5 < ten / one < 15


def test_the_peak_of_an_allocator():
    device = torch.device("cuda")

    def call() -> torch.Tensor:
        first = torch.empty(8 * 2**20, dtype=torch.uint8, device=device)
        del first
        return torch.empty(4 * 2**20, dtype=torch.uint8, device=device)

    assert peak_bytes(call, device) == 8 * 2**20
