"""The attention benchmark's table and picture, from figures made up here; measuring needs a GPU."""

import json

import pytest
import torch

from flash_ladder.benchmark import Cell, benchmark, describe_cell
from flash_ladder.schema import BenchmarkConfig, UserError


def result(path) -> str:
    cells = [
        Cell("flash_v2", 64, 1024, True, 300.0, 240.0, 0.25),
        Cell("fa2", 64, 1024, True, 200.0, 160.0, 0.5),
        Cell("eager", 64, 1024, True, note="out of memory"),
        Cell("flash_v2", 64, 4096, True, 400.0, None, 0.25, note="refused: no backward"),
        Cell("fa2", 64, 4096, True, 250.0, 200.0, 0.5),
    ]
    config = {"dtype": "bfloat16", "tokens": 4096, "width": 2048, "baseline": "fa2"}
    path.write_text(json.dumps({"device": "a GPU", "torch": "2", "config": config, "cells": [vars(c) for c in cells]}))
    return str(path)


def test_a_cell_in_words():
    fa2 = Cell("fa2", 64, 1024, True, 200.0, 160.0, 0.5)
    assert describe_cell(Cell("flash_v2", 64, 1024, True, 300.0, 240.0, 0.25), fa2) == "flash_v2 300/240 (1.50/1.50) 0.25 GiB"
    assert describe_cell(fa2, fa2) == "fa2 200/160 0.50 GiB"
    assert describe_cell(Cell("eager", 64, 1024, True, note="out of memory"), fa2) == "eager out of memory"


def test_an_earlier_run_shown_again(tmp_path, capsys):
    picture = tmp_path / "picture.png"
    benchmark(BenchmarkConfig(read=result(tmp_path / "r.json"), plot=str(picture)))
    printed = capsys.readouterr().out
    assert "causal D=64  S=1024  flash_v2 300/240 (1.50/1.50)" in printed and "eager out of memory" in printed
    assert "flash_v2 400/- (1.60/-)" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_no_result(tmp_path):
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(UserError, match="is not a result of this command"):
        benchmark(BenchmarkConfig(read=str(tmp_path / "r.json")))
    with pytest.raises(UserError, match="No such file"):
        benchmark(BenchmarkConfig(read=str(tmp_path / "other.json")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu():
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        benchmark(BenchmarkConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backends": ["flash_v3"]}, "backends=flash_v3 is not a choice"),
        ({"baseline": "cudnn", "backends": ["fa2"]}, "baseline=cudnn is not among backends"),
        ({"head_dim": [96]}, "must be a whole number of heads"),
        ({"seq_len": [0]}, "seq_len=0 must be at least 1"),
    ],
)
def test_checks(change, message):
    with pytest.raises(UserError, match=message):
        BenchmarkConfig(**change).validate()
