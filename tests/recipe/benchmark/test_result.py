"""What follows from a benchmark's cells: memory of a sequence, means, and the file they are kept in."""

import json
from pathlib import Path

import pytest

from flash_ladder.benchmark.result import Cell, Panel, batch_size, mean_speedup, read, save
from flash_ladder.errors import UserError
from flash_ladder.measure.growth import growth
from tests.helpers.made_up_benchmark import made_up

CAUSAL = Panel(True, 64, None)


def test_memory_of_one_sequence():
    result = made_up()
    assert batch_size(4096, 1024) == 4 and batch_size(4096, 8192) == 1
    assert result.sequence_bytes(CAUSAL, "flash_v2") == pytest.approx({1024: 2**22, 4096: 2**24, 8192: 2**25})
    assert result.sequence_bytes(CAUSAL, "eager") == pytest.approx({1024: 2**26, 4096: 2**30})
    assert growth(result.sequence_bytes(CAUSAL, "eager")).exponent == pytest.approx(2)
    assert growth(result.sequence_bytes(CAUSAL, "flash_v2")).exponent == pytest.approx(1)
    assert result.out_of_memory_at(CAUSAL, "eager") == 8192
    assert result.out_of_memory_at(CAUSAL, "fa3") is None


def test_mean_speedup():
    result = made_up()
    assert mean_speedup(result, "flash_v2", "fa2", "forward_tflops") == pytest.approx(2)
    assert mean_speedup(result, "flash_v2", "fa3", "backward_tflops") is None
    result.cells[1].forward_tflops = 6400  # 32 times fa2's in one of four shapes: (32 · 2³) ** (1 / 4)
    assert mean_speedup(result, "flash_v2", "fa2", "forward_tflops") == pytest.approx(4)


def test_time_over_the_share_of_the_dense_time():
    window, ragged, eager = made_up().masks
    assert (window.forward, window.backward) == pytest.approx((1, 1.2))
    assert (ragged.forward, ragged.backward) == pytest.approx((1.5, 1))
    assert eager.forward == pytest.approx(8) and eager.backward is None


def test_peak_is_of_the_gpu_and_the_dtype():
    assert made_up().peak == 989
    assert made_up(device="A GPU, sm_70").peak is None
    assert made_up(config={**made_up().config, "dtype": "float32"}).peak == 67


def test_written_and_read(tmp_path):
    save(made_up(finished=False), tmp_path / "r.json")
    assert read(tmp_path / "r.json") == made_up(finished=False)


def test_a_file_of_the_first_version_of_this_command():
    found = read(Path(__file__).parents[3] / "docs" / "attention_h200.json")
    assert found.backends[0].startswith(("eager", "flash")) and found.peak == 989 and found.masks == []
    assert growth(found.sequence_bytes(CAUSAL, "flash_v2")).exponent == pytest.approx(1, abs=0.05)


def test_the_fields_of_that_version(tmp_path):
    config = {"dtype": "bfloat16", "tokens": 4096, "width": 2048, "seq_len": [1024], "baseline": "fa2"}
    cell = dict(
        backend="fa2", head_dim=64, seq_len=1024, causal=True, forward_tflops=1.0, backward_tflops=None, peak_gib=0.5, note=""
    )
    (tmp_path / "r.json").write_text(json.dumps({"device": "a GPU", "torch": "2", "config": config, "cells": [cell]}))
    found = read(tmp_path / "r.json")
    assert found.cells == [Cell(**cell)] and found.errors == [] and found.finished


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"device": "x", "torch": "2", "config": {}, "cells": []}', "{'a'"])
def test_what_is_no_result(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match="is not a result of this command"):
        read(tmp_path / "r.json")


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "r.json")
