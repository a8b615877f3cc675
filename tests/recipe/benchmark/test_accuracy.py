"""Errors against float64: small for a backend that is right, large for one that is not, and a note where there is none."""

import torch

import flash_ladder.benchmark.accuracy as module
from flash_ladder.benchmark.accuracy import measure_error, yardstick
from flash_ladder.benchmark.grid import complete
from flash_ladder.benchmark.result import Panel
from flash_ladder.script_schema import BenchmarkConfig

CPU = torch.device("cpu")
CAUSAL = Panel(True, 32, None)


def decided() -> BenchmarkConfig:
    return complete(BenchmarkConfig(backends=["eager", "flash_v2"], causal=[True], error_seq_len=64), CPU)[0]


def test_a_wrong_backend_has_a_large_error(monkeypatch):
    cfg = decided()
    right = yardstick(cfg, CAUSAL, CPU)
    assert [x.dtype for x in right.exact] == [torch.float64] * 4 and not right.note
    good = measure_error(cfg, "sdpa", CAUSAL, right, CPU)
    monkeypatch.setattr(module, "attend_with", lambda *_: lambda query, key, value: (query + key + value) * 1.0)
    wrong = measure_error(cfg, "sdpa", CAUSAL, right, CPU)
    assert good.output < 1e-6 and good.dv < 1e-6 and wrong.output > 0.5 and wrong.dv > 0.5


def test_no_float64_is_a_note(monkeypatch):
    def gone(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(module, "attend_with", gone)
    right = yardstick(decided(), CAUSAL, CPU)
    error = measure_error(decided(), "sdpa", CAUSAL, right, CPU)
    assert error.note == "no float64 to compare with: out of memory" and error.output is None
