"""flash_ladder.training.speed: what a run's speed, memory and energy are of."""

import math
import os

import pytest
import torch

from flash_ladder.measure.energy import EnergyCounter
from flash_ladder.measure.flops import flops_per_token
from flash_ladder.training import speed as module
from flash_ladder.training.run import train
from flash_ladder.training.speed import Interval, Speed, Work, peak_memory_gib, reset_peak_memory
from tests.helpers.tiny import metrics, tiny_config, values

CPU = torch.device("cpu")
WORK = Work(tokens=100, flops=flops_per_token(1, 1, 1, 1), peak_tflops=None)
TOKENS, JOULES = "speed/tokens_per_second", "energy/joules_per_token"


def test_mfu_is_flops_over_peak_and_absent_where_the_peak_is_unknown():
    flops = flops_per_token(123_587_328, 12, 768, 1024)
    rates = Work(tokens=1, flops=flops, peak_tflops=989.0).rates(522_985.0)
    assert rates["speed/mfu"] == pytest.approx(0.452, abs=5e-4)
    assert rates["speed/mfu"] == pytest.approx(rates["speed/model_tflops"] / 989)
    assert 0.4 < rates["speed/mfu_causal"] < rates["speed/mfu"]
    unknown = Work(tokens=1, flops=flops, peak_tflops=None).rates(522_985.0)
    assert set(unknown) == {TOKENS, "speed/model_tflops"}


def test_the_summary_leaves_the_beginning_out_where_there_is_more():
    speed = Speed(WORK, log_every=2, started=0.0)
    assert speed.summary() == {}
    speed.intervals = [Interval(1, 10.0, math.nan, warm=False)]
    assert speed.summary()[TOKENS] == 10
    speed.intervals += [Interval(2, 2.0, math.nan, warm=False)]
    assert speed.summary()[TOKENS] == 100
    speed.intervals += [Interval(2, 1.0, 8.0, warm=True), Interval(2, 3.0, 24.0, warm=True)]
    assert speed.summary() == pytest.approx(WORK.rates(100.0) | {JOULES: 32 / 400, "energy/watts": 8.0})


def test_the_window_slides():
    speed = Speed(WORK, log_every=10, started=0.0)
    assert speed.window() == {}
    speed.intervals = [Interval(1, 1.0, math.nan, False), Interval(3, 6.0, math.nan, True), Interval(5, 4.0, math.nan, True)]
    assert speed.window()[TOKENS] == 100 * 8 / 10  # the latest two fill ten seconds
    speed.intervals.append(Interval(10, 40.0, 80.0, True))
    assert speed.window()[TOKENS] == 100 * 10 / 40  # one that is longer than the window stands alone
    assert speed.window()[JOULES] == 80 / 1000


def test_energy_that_one_device_does_not_count_is_absent_for_all():
    speed = Speed(WORK, log_every=1, started=0.0)
    speed.intervals = [Interval(1, 1.0, 5.0, True), Interval(1, 1.0, math.nan, True)]
    assert JOULES not in speed.summary()
    assert math.isnan(EnergyCounter(CPU).joules())


def test_the_peak_counts_from_the_start_of_a_run():
    ballast = torch.ones(2**26)  # 256 MiB
    high = peak_memory_gib(CPU)
    del ballast
    reset_peak_memory(CPU)
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not let a process reset its peak")
    assert peak_memory_gib(CPU) < high - 0.2
    ballast = torch.ones(2**26)
    assert peak_memory_gib(CPU) > high - 0.05
    del ballast


def test_speed_shows_from_the_second_step_on_and_memory_is_of_all_devices(tmp_path, monkeypatch):
    gathered = []

    def two_devices(own, device):
        gathered.append(own)
        return [own, [2 * own[0], 3.0]]

    monkeypatch.setattr(module, "of_all_devices", two_devices)
    monkeypatch.setattr(module.EnergyCounter, "joules", lambda self: 1.0)
    train(tiny_config(tmp_path, log_every=100, max_steps=7, val_every=7), tmp_path / "run")
    rates = values(tmp_path / "run", TOKENS)
    assert list(rates) == [2, 5, 7]
    peaks = values(tmp_path / "run", "memory/peak_gib")
    own = {step: peak for step, (peak, _) in zip(peaks, gathered, strict=True)}
    assert peaks == {step: 2 * peak for step, peak in own.items()}
    assert values(tmp_path / "run", "memory/peak_sum_gib") == {step: 3 * peak for step, peak in own.items()}
    joules = values(tmp_path / "run", JOULES)
    assert joules[2] == pytest.approx(3 / 32)  # one step of 2 sequences of 16 tokens
    assert joules[7] == pytest.approx(3 * 3 / (6 * 32))  # all intervals fit into the window


def test_the_gradients_norm_is_the_one_before_clipping(tmp_path):
    from dataclasses import replace

    norms = {}
    for clip in (0.0, 1e-3, 1e3):
        cfg = tiny_config(tmp_path, max_steps=1, val_every=1)
        train(replace(cfg, optimizer=replace(cfg.optimizer, grad_clip=clip)), tmp_path / f"run{clip}")
        norms[clip] = values(tmp_path / f"run{clip}", "train/grad_norm")[1]
    assert norms[0.0] == pytest.approx(norms[1e-3]) == pytest.approx(norms[1e3])
    assert norms[0.0] > 0.01


def test_the_first_step_counts_from_the_runs_own_start(tmp_path):
    for run in ("one", "two"):
        train(tiny_config(tmp_path, max_steps=1, val_every=1), tmp_path / run)
    first = [line["speed/first_step_seconds"] for run in ("one", "two") for line in metrics(tmp_path / run) if "train/loss" in line]
    assert len(first) == 2 and all(0 < seconds < 10 for seconds in first)
    assert first[1] < first[0] + 2  # not the time of both
