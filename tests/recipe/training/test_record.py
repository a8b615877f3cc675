"""flash_ladder.training.record, flops and probe: what is logged, what it means."""

import json
import math
import shutil
import time

import pytest
import torch

from flash_ladder.errors import UserError
from flash_ladder.measure.flops import PEAKS, attention_flops, flops_per_token, peak_tflops
from flash_ladder.measure.probe import Layer, probe_attention
from flash_ladder.training.metrics import attention_metrics
from flash_ladder.training.record import MetricsFile, best_validation, read_metrics, rows_until
from tests.helpers.disk import disk_with

CPU = torch.device("cpu")


# ---- FLOPs ----


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("Tesla T4", None),  # no bf16
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GeForce RTX 2060 SUPER", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_dense_peak_of_a_gpu_by_its_name(name, bf16):
    assert peak_tflops(name, "bf16-mixed") == bf16


def test_peaks_in_other_precisions():
    assert peak_tflops("Tesla T4", "16-mixed") == 65
    assert peak_tflops("Tesla V100-SXM2-32GB", "16-mixed") == 125
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "32") == 19.5
    assert all(fp32 < fp16 for _, fp16, fp32 in PEAKS.values())


def test_flops_of_gpt2_124m_by_both_conventions():
    # nanoGPT's count: 123,587,328 parameters multiply (bias=False, vocabulary 50304); 6 N + 12 L S d at 1024 positions.
    flops = flops_per_token(123_587_328, n_layer=12, d_model=768, seq_len=1024)
    assert flops.full == 6 * 123_587_328 + 12 * 12 * 1024 * 768
    # Causal: position i sees i + 1 keys.
    pairs = sum(i + 1 for i in range(1024))
    assert flops.causal == pytest.approx(6 * 123_587_328 + 12 * 12 * 768 * pairs / 1024)
    # Two blocks of twelve with windows: position i sees i + 1 keys, and at most its window.
    windowed = flops_per_token(0, n_layer=12, d_model=768, seq_len=1024, windows=(100, 5000))
    assert windowed.full == 12 * 768 * (11 * 1024 + 100)
    in_window = sum(min(i + 1, 100) for i in range(1024))
    assert windowed.causal == pytest.approx(12 * 768 * (11 * pairs + in_window) / 1024)
    # 2 products of 2·S·D FLOPs a row and head, half of them causal, and a backward of 2.5 times that.
    assert attention_flops(2, 3, 128, 64) == 3.5 * 2 * 3 * (2 * 2 * 128 * 128 * 64) / 2


# ---- the attention probe ----


def layer(seq_len):
    return Layer(2, 4, 2, seq_len, 16, torch.float32, CPU)


def test_eager_keeps_the_square_of_the_length_and_sdpa_its_multiple():
    short, long = (probe_attention(layer(n), "sdpa") for n in (256, 512))
    # sdpa: the output [2, 4, S, 16] and a log-sum-exp [2, 4, S], float32.
    assert short.bytes == 2 * 4 * 256 * (16 + 1) * 4
    assert long.bytes == 2 * short.bytes
    assert short.eager_bytes >= layer(256).score_bytes == 2 * 4 * 256 * 256 * 4
    assert 3.5 < long.eager_bytes / short.eager_bytes < 4
    logged = attention_metrics(long)
    assert set(logged) == {
        "memory/attention_gib",
        "memory/attention_eager_gib",
        "memory/attention_eager_is_analytic",
        "memory/attention_saved_gib_vs_eager",
        "memory/attention_saved_ratio_vs_eager",
        "speed/attention_seconds",
        "speed/attention_eager_seconds",
        "speed/attention_tflops",
        "speed/attention_speedup_vs_eager",
    }
    assert logged["memory/attention_gib"] == long.bytes / 2**30
    assert logged["memory/attention_saved_gib_vs_eager"] == pytest.approx((long.eager_bytes - long.bytes) / 2**30)
    assert logged["memory/attention_saved_ratio_vs_eager"] == pytest.approx(long.eager_bytes / long.bytes)
    assert logged["speed/attention_speedup_vs_eager"] == pytest.approx(long.eager_seconds / long.seconds)
    assert logged["memory/attention_eager_is_analytic"] == 0


def test_where_eager_does_not_fit_its_analytic_size_is_logged_and_marked(monkeypatch):
    monkeypatch.setattr("flash_ladder.measure.probe.free_memory", lambda: layer(64).score_bytes)
    probe = probe_attention(layer(64), "sdpa")
    assert probe.eager_bytes == layer(64).score_bytes and probe.eager_seconds is None
    assert attention_metrics(probe)["memory/attention_eager_is_analytic"] == 1
    assert "speed/attention_speedup_vs_eager" not in attention_metrics(probe)
    assert "does not fit" in str(probe)


def test_a_backend_in_the_interpreter_is_measured_in_memory_alone():
    probe = probe_attention(Layer(1, 1, 1, 32, 16, torch.float32, CPU), "flash_v2")
    assert probe.bytes == 32 * (16 + 1) * 4 and probe.seconds is None
    assert not any(name.startswith("speed/") for name in attention_metrics(probe))
    assert "time not compared" in str(probe)


def test_eager_is_its_own_measure():
    probe = probe_attention(layer(64), "eager")
    assert attention_metrics(probe)["memory/attention_saved_gib_vs_eager"] == 0
    assert attention_metrics(probe)["speed/attention_speedup_vs_eager"] == 1


# ---- metrics.jsonl and environment.json ----


def test_metrics_are_json_lines_and_nan_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsFile(path)
    log.log_metrics({"train/loss": 1.5, "val/loss": math.nan, "speed/mfu": math.inf}, step=3)
    line = json.loads(path.read_text())  # there without closing: it is flushed
    assert {k: v for k, v in line.items() if k != "time"} == {"step": 3, "train/loss": 1.5, "val/loss": None, "speed/mfu": None}
    assert abs(line["time"] - time.time()) < 60
    log.close()


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_keeps_what_was_before_its_checkpoint(tmp_path):
    """Not the steps that a kill took, which come again, nor the torn line, nor what was measured at an earlier start from there."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "a/b": 1.5}, {"step": 2, "a/b": 2.5}, {"step": 2, "val/loss": None}]
    later = [{"step": 2, "memory/attention_gib": 1.0}, {"step": 3, "a/b": 3.5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + later) + '{"step": 4, "tr')
    assert [json.loads(line) for line in rows_until(path, 2).splitlines()] == rows
    assert rows_until(tmp_path / "none.jsonl", 2) == ""


DAMAGED = [b"\xff\xfe", b"[1]", b"3", b'{"a": 1}', b'{"step": "x"}', b'{"step": 1, "a/b": [1]}', b"[" * 10**5]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_is_left_out_with_a_warning(tmp_path, damage, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert capsys.readouterr().err == f"warning: {path}: 1 of 3 lines are damaged and left out\n"


def test_a_folder_in_its_place_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("what", ["folder", "file", "replaced"])
def test_a_removed_record_is_written_anew_and_said(tmp_path, what, capsys):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    log = MetricsFile(path, restore=lambda: (path.parent / "config.yaml").touch())
    log.log_metrics({}, step=1)
    shutil.rmtree(path.parent) if what == "folder" else path.unlink()
    if what == "replaced":
        path.write_text("something else\n")
    log.log_metrics({}, step=2)
    assert f"{path} was removed while the run trained (seen at step 2)" in capsys.readouterr().err
    log.log_metrics({}, step=3)
    path.unlink()
    log.close()  # and once more, after the last row
    log.close()
    assert steps(path) == [1, 2, 3] and (path.parent / "config.yaml").exists()
    assert "seen at step 3" in log.trouble


def test_rows_that_the_disk_does_not_take_wait(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    log = MetricsFile(path)
    log.log_metrics({}, step=1)
    with disk_with(bytes_left=path.stat().st_size + 10):
        log.log_metrics({}, step=2)
        log.log_metrics({}, step=3)
    assert (
        capsys.readouterr().err == f"warning: {path} cannot be written (File too large); its rows from step 2 on wait in memory\n"
    )
    log.log_metrics({}, step=4)
    assert steps(path) == [1, 2, 3, 4] and log.trouble is None
    with disk_with(bytes_left=0):
        log.log_metrics({}, step=5)
        log.close()
    assert steps(path) == [1, 2, 3, 4] and "lacks the last 1 rows" in log.trouble


def test_read_metrics_and_the_best_validation(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == [] and best_validation([]) is None
    lines = [
        {"step": 2, "val/loss": 3.0},
        {"step": 4, "val/loss": 1.5},
        {"step": 5, "train/loss": 1.0},
        {"step": 6, "val/loss": None},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "val/lo')
    assert read_metrics(path) == lines
    assert best_validation(lines) == (1.5, 4)
