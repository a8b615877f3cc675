"""The tables and the record of export and evaluate, from figures made up."""

import torch

from flash_ladder.export.losses import Evaluation
from flash_ladder.export.parity import Check, loss_limit
from flash_ladder.export.verdict import align, describe_windows, report, same_loss, verdict

GOOD, BAD, TOLD = Check("mean KL", 1e-9, 1e-8), Check("equal greedy tokens", 0.5, 0.999, is_share=True), Check("max |Δ logit|", 3.0)


def test_windows_in_words():
    assert describe_windows({"tokens": torch.zeros(3, 129)}) == "3 windows of 128 tokens"
    assert describe_windows({"tokens": torch.zeros(1, 9)}) == "1 window of 8 tokens"


def test_the_loss_recorded_earlier():
    check = same_loss("export (sdpa)", 2.0, Evaluation("eager", "32", 2.5, 100, 1.0, [2.5]), 0.0)
    assert check == Check("|Δ loss| to export (sdpa)", 0.5, loss_limit(0.0, 100)) and not check.within


def test_a_figure_that_is_told_and_not_judged_is_within():
    found = verdict([GOOD, TOLD])
    assert found["within"] and found["checks"]["max |Δ logit|"] == {"value": 3.0, "limit": None, "within": True}
    assert not verdict([GOOD, BAD])["within"]


def test_the_report_says_what_is_beyond(capsys):
    assert report({"sdpa": 1.0, "eager": 1.0}, [GOOD, TOLD], "sdpa against eager", "written to x") == 0
    printed = capsys.readouterr().out
    assert "1.000000" in printed and "ok" in printed and printed.endswith("written to x\n") and "beyond" not in printed
    assert report({"sdpa": 1.0}, [GOOD, BAD], "sdpa against eager", None) == 1
    printed = capsys.readouterr().out
    assert "BEYOND" in printed and "beyond tolerance: equal greedy tokens is 50.000%, its limit 99.900%" in printed


def test_columns_are_aligned():
    assert align([["", "a"], ["long", "1.5"]]) == "        a\nlong  1.5"
