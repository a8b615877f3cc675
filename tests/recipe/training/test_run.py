"""flash_ladder.training.run: a run from its text to its report, going on from a checkpoint, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from flash_ladder.errors import UserError
from flash_ladder.export.export import export_run
from flash_ladder.machine.decide import decide
from flash_ladder.schema import AttentionConfig, OptimizerConfig
from flash_ladder.script_schema import ExportConfig
from flash_ladder.training.optimizer import lr_factor
from flash_ladder.training.report import perplexity_in_words, printable
from flash_ladder.training.run import say_passes, train
from tests.helpers import commands
from tests.helpers.tiny import metrics, overrides, tiny_config, values

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


def checkpoint(run, name="last"):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def command(*arguments, cwd, timeout=60):
    """Runs train.py in a process of its own."""
    return commands.run("train.py", *arguments, cwd=cwd, timeout=timeout)


@pytest.mark.parametrize(
    ("tokens", "said", "warned"),
    [
        (100, "steps: 100 tokens in all, 0.1 passes", False),
        (4_000, "4 passes", False),
        (4_100, "4.1 passes", True),
        (2**20, "1,049", True),
    ],
)
def test_passes_over_the_text_are_said_and_many_are_warned_of(capsys, tokens, said, warned):
    say_passes(tokens, 1_000)
    out, errors = capsys.readouterr()
    assert said in out and ("beyond 4, a model mostly learns it by heart" in errors) == warned


def test_of_a_stream_nothing_is_said(capsys):
    say_passes(10**9, None)
    assert capsys.readouterr() == ("", "")


# ---- one run ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps in one go: its configuration, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    cfg = tiny_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **kwargs: printed.append(" ".join(map(str, words))))
        train(cfg, folder / "run")
    return cfg, folder / "run", "\n".join(printed)


def test_a_run_leaves_its_record(whole):
    _, run, _ = whole
    files = {
        "config.yaml",
        "metrics.jsonl",
        "environment.json",
        "tokenizer.json",
        "result.json",
        "train.log",
        "validation.safetensors",
    }
    assert {p.name for p in run.iterdir()} == {*files, "checkpoints"}
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    environment = json.loads((run / "environment.json").read_text())
    assert environment["attention"]["backend"] == "sdpa" and environment["precision"]["precision"] == "32"
    assert checkpoint(run)["global_step"] == 6
    assert checkpoint(run)["hyper_parameters"]["config"]["model"]["vocab_size"] == 320  # 257 rounded up to 64


def test_metrics_have_the_names_of_the_design(whole):
    _, run, _ = whole
    steps = [line["step"] for line in metrics(run)]
    assert steps == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    names = {name for line in metrics(run) for name in line}
    assert names == {
        "step",
        "time",
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "val/loss",
        "val/perplexity",
        "speed/tokens_per_second",
        "speed/model_tflops",
        "speed/first_step_seconds",
        "speed/attention_seconds",
        "speed/attention_eager_seconds",
        "speed/attention_tflops",
        "speed/attention_speedup_vs_eager",
        "memory/peak_gib",
        "memory/peak_sum_gib",
        "memory/attention_gib",
        "memory/attention_eager_gib",
        "memory/attention_eager_is_analytic",
        "memory/attention_saved_gib_vs_eager",
        "memory/attention_saved_ratio_vs_eager",
    }  # no MFU on a CPU
    assert list(values(run, "val/loss")) == [3, 6]
    losses = values(run, "train/loss")
    assert losses[6] < losses[1]
    assert values(run, "memory/peak_gib")[6] > 0.1


def test_the_report_says_what_a_run_came_to(whole):
    _, run, printed = whole
    assert printed.startswith("attention: sdpa (CPU, float32, head_dim 16)\nprecision: 32 (a CPU)\ndata: 24 documents")
    assert f"validation   loss {values(run, 'val/loss')[6]:.4f}" in printed
    for name in (
        "attention memory: one layer",
        "\nbaseline",
        "| def ",
        "\nspeed",
        "tokens/s",
        "\npeak memory",
        "\nattention    sdpa",
    ):
        assert name in printed, name
    assert f"\nrun          {run}: checkpoints/best.ckpt" in printed


def test_best_is_the_lowest_validation_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "flash_ladder.training.optimizer.lr_factor", lambda step, *_: 1 if step < 2 else -1
    )  # two steps down, then up
    train(tiny_config(tmp_path, val_every=1, max_steps=4), tmp_path / "run")
    losses = values(tmp_path / "run", "val/loss")
    assert len(losses) == 4
    assert checkpoint(tmp_path / "run", "best")["global_step"] == min(losses, key=losses.get) == 2


def test_mixed_precision_documents_and_recomputation_go_together(tmp_path):
    cfg = tiny_config(tmp_path, precision="bf16-mixed", activation_checkpointing=True, accumulate=2)
    cfg = replace(cfg, data=replace(cfg.data, document_ids=True), optimizer=replace(cfg.optimizer, grad_clip=1.0))
    train(cfg, tmp_path / "run")
    assert values(tmp_path / "run", "val/loss")[6] < values(tmp_path / "run", "val/loss")[3]


@pytest.mark.parametrize("backend", ["eager", "flash_v2"])
@pytest.mark.filterwarnings("ignore:flash_v2 runs in Triton's interpreter")
def test_every_backend_trains_the_same_model(tmp_path, whole, backend):
    cfg = tiny_config(tmp_path, max_steps=3)
    train(replace(cfg, attention=AttentionConfig(backend=backend)), tmp_path / "run")
    expected = {step: loss for step, loss in values(whole[1], "train/loss").items() if step <= 3}
    assert values(tmp_path / "run", "train/loss") == pytest.approx(expected, rel=1e-4)


def test_a_step_of_so_many_tokens(tmp_path, whole):
    """The run of two sequences of 16 tokens a step, asked for by the tokens: the same losses, and the batch is on record."""
    before, folder, _ = whole
    cfg = tiny_config(tmp_path)
    cfg = replace(cfg, data=replace(cfg.data, batch_size=7, tokens_per_step=32, files=before.data.files))
    train(cfg, tmp_path / "run")
    saved = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert (saved.data.batch_size, saved.trainer.accumulate, saved.data.tokens_per_step) == (2, 1, 32)
    assert values(tmp_path / "run", "train/loss") == values(folder, "train/loss")
    again = replace(cfg, resume=str(tmp_path / "run"), trainer=replace(cfg.trainer, max_steps=8))
    train(again, tmp_path / "run")
    assert list(values(tmp_path / "run", "train/loss")) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("loss", "said"),
    [(1.0, "perplexity 2.72"), (13.5, "perplexity 729416.37"), (300.0, "perplexity 1.94e+130"), (1e4, "perplexity inf")],
)
def test_a_loss_that_diverged_is_still_reported(loss, said):
    assert perplexity_in_words(loss) == said


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2J\tb\n\x00é") == "a\ufffd[2J\tb\n\ufffdé"


def test_the_last_step_is_validated_and_saved_wherever_it_falls(tmp_path):
    train(tiny_config(tmp_path, max_steps=4), tmp_path / "run")
    assert list(values(tmp_path / "run", "val/loss")) == [3, 4]
    assert checkpoint(tmp_path / "run")["global_step"] == 4


def test_a_run_that_only_measures_keeps_no_checkpoint(tmp_path, capsys):
    train(tiny_config(tmp_path, checkpoints=False), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    printed = capsys.readouterr().out
    assert "\nrun          " in printed and "checkpoints/" not in printed and "\nnext" not in printed


@pytest.mark.parametrize("document_ids", [False, True])
def test_a_run_is_exported_without_its_text(tmp_path, capsys, document_ids):
    cfg = tiny_config(tmp_path)
    train(replace(cfg, data=replace(cfg.data, document_ids=document_ids)), tmp_path / "run")
    export = ExportConfig(run=str(tmp_path / "run"), out=str(tmp_path / "before"))
    assert export_run(export) == 0
    shutil.rmtree(tmp_path / "text")
    shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    assert export_run(replace(export, out=str(tmp_path / "after"))) == 0
    assert "4 windows of 16 tokens" in (said := capsys.readouterr().out) and "|Δ loss| to training" in said
    before, after = ((tmp_path / name / "validation.safetensors").read_bytes() for name in ("before", "after"))
    assert before == after
    assert export_run(replace(export, windows=2, seq_len=8)) == 0
    with pytest.raises(UserError, match="no such file"):  # more than the run keeps
        export_run(replace(export, windows=5))


# ---- going on ----


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_gives_the_bits_of_an_uninterrupted_run(tmp_path, accumulate):
    cfg = tiny_config(tmp_path, accumulate=accumulate)
    train(cfg, tmp_path / "whole")
    run = tmp_path / "run"
    train(replace(cfg, trainer=replace(cfg.trainer, max_steps=3)), run)
    train(replace(cfg, resume=str(run)), run)
    for name in ("train/loss", "val/loss"):
        assert values(run, name) == values(tmp_path / "whole", name)
    assert [line["step"] for line in metrics(run)] == [0, 1, 2, 3, 3, 3, 4, 5, 6, 6]
    whole, resumed = checkpoint(tmp_path / "whole"), checkpoint(run)
    assert same_weights(whole["state_dict"], resumed["state_dict"])
    assert whole["lr_schedulers"] == resumed["lr_schedulers"]


def test_a_run_stopped_by_a_signal_goes_on_to_the_same_bits(tmp_path, whole, monkeypatch):
    cfg, uninterrupted, _ = whole
    from flash_ladder.training.module import GPTModule

    step = GPTModule.training_step

    def interrupt(self, batch, batch_idx):
        if batch_idx == 3:  # inside step 4
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(GPTModule, "training_step", interrupt)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        train(cfg, tmp_path / "run")
    assert stop.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoint(tmp_path / "run")["global_step"] == 4
    monkeypatch.undo()
    train(replace(cfg, resume=str(tmp_path / "run")), tmp_path / "run")
    for name in ("train/loss", "val/loss"):
        assert values(tmp_path / "run", name) == values(uninterrupted, name)
    assert same_weights(checkpoint(tmp_path / "run")["state_dict"], checkpoint(uninterrupted)["state_dict"])


def test_a_run_that_moved_keeps_its_best(tmp_path, monkeypatch, recwarn):
    factor = {0: 1, 1: 1, 2: -1, 3: -1}  # two steps down, then up
    monkeypatch.setattr("flash_ladder.training.optimizer.lr_factor", lambda step, *_: factor.get(step, -1))
    cfg = tiny_config(tmp_path, val_every=1, max_steps=2)
    train(cfg, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    train(replace(cfg, resume=str(tmp_path / "moved"), trainer=replace(cfg.trainer, max_steps=4)), tmp_path / "moved")
    losses = values(tmp_path / "moved", "val/loss")
    assert min(losses, key=losses.get) == 2 and losses[4] > losses[2]
    assert checkpoint(tmp_path / "moved", "best")["global_step"] == 2
    assert json.loads((tmp_path / "moved" / "result.json").read_text())["metrics"]["val/best_loss"] == losses[2]
    assert not [warning for warning in recwarn if "dirpath" in str(warning.message)]


def resumable(tmp_path, **trainer):
    """A finished run of three steps, and the configuration that would go on to six."""
    cfg = tiny_config(tmp_path, **trainer)
    train(replace(cfg, trainer=replace(cfg.trainer, max_steps=3)), tmp_path / "run")
    return replace(cfg, resume=str(tmp_path / "run")), tmp_path / "run"


def test_optimizer_values_given_at_resume_are_taken(tmp_path):
    cfg, run = resumable(tmp_path)
    cfg = replace(cfg, optimizer=replace(cfg.optimizer, lr=1e-5, weight_decay=0.3, beta1=0.5, beta2=0.6))
    train(cfg, run)
    assert values(run, "train/lr") == {1: 1e-2, 2: 1e-2, 3: 1e-2, 4: 1e-5, 5: 1e-5, 6: 1e-5}
    matrices, vectors = checkpoint(run)["optimizer_states"][0]["param_groups"]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert all(group["betas"] == (0.5, 0.6) and group["initial_lr"] == 1e-5 for group in (matrices, vectors))
    assert checkpoint(run)["lr_schedulers"][0]["base_lrs"] == [1e-5, 1e-5]


def test_a_changed_schedule_holds_from_the_first_step_on(tmp_path):
    cfg, run = resumable(tmp_path)
    train(replace(cfg, optimizer=replace(cfg.optimizer, min_lr_ratio=0.5)), run)
    halved = OptimizerConfig(warmup_steps=0, min_lr_ratio=0.5)
    assert values(run, "train/lr")[4] == pytest.approx(1e-2 * lr_factor(3, halved, 6)) != 1e-2


def test_resume_refuses_what_it_cannot_go_on_from(tmp_path):
    cfg, run = resumable(tmp_path)
    last = run / "checkpoints" / "last.ckpt"
    good = last.read_bytes()
    with pytest.raises(UserError, match=r"at step 3 of trainer.max_steps=3: nothing is left to do; trainer.max_steps=6 would"):
        train(replace(cfg, trainer=replace(cfg.trainer, max_steps=3)), run)
    with pytest.raises(UserError, match=r"trained with model\.n_kv_head=1, not 2"):
        train(replace(cfg, model=replace(cfg.model, n_kv_head=2)), run)
    with pytest.raises(UserError, match=r"embedding.weight is \(8, 32\)"):
        changed = torch.load(last, weights_only=True)
        changed["state_dict"]["net.embedding.weight"] = torch.zeros(8, 32)
        torch.save(changed, last)
        train(cfg, run)
    last.write_bytes(good[:1000])
    (run / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(UserError, match=r"last.ckpt"):
        train(cfg, run)
    torch.save({"weights": 1}, last)
    with pytest.raises(UserError, match=r"last.ckpt was not written by"):
        train(cfg, run)
    last.unlink()
    with pytest.raises(UserError, match=r"no checkpoint last.ckpt"):
        train(cfg, run)
    last.write_bytes(good)
    train(cfg, run)
    assert checkpoint(run)["global_step"] == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_fraction": 0.3}, r"held out text by data\.val_fraction=0\.2, and with 0\.3 it would validate"),
        ({"split_seed": 1}, r"data\.split_seed=0 goes on, or start a new run"),
        ({"files": "changed"}, "its corpus has changed"),
    ],
)
def test_resume_never_validates_on_what_was_trained_on(tmp_path, change, message):
    """Bytes have one tokenizer whatever the text, so that nothing but the split tells."""
    cfg, run = resumable(tmp_path)
    if "files" in change:
        (tmp_path / "text" / "zz.txt").write_text("one more document\n" * 30)
        change = {}
    with pytest.raises(UserError, match=message):
        train(replace(cfg, data=replace(cfg.data, **change)), run)
    assert checkpoint(run)["global_step"] == 3


def test_another_seed_redraws_the_split_only_where_it_draws_it(tmp_path):
    cfg, run = resumable(tmp_path)
    train(replace(cfg, seed=7), run)
    free = replace(cfg, data=replace(cfg.data, split_seed=None), resume=None)
    train(replace(free, trainer=replace(cfg.trainer, max_steps=3)), tmp_path / "free")
    with pytest.raises(UserError, match=r"held out text by seed=1337, and with 7"):
        train(replace(free, seed=7, resume=str(tmp_path / "free")), tmp_path / "free")


def test_resume_refuses_another_tokenizer(tmp_path):
    cfg = tiny_config(tmp_path)
    cfg = replace(cfg, data=replace(cfg.data, tokenizer="bpe", vocab_size=300))
    train(replace(cfg, trainer=replace(cfg.trainer, max_steps=3)), tmp_path / "run")
    for path in (tmp_path / "text").iterdir():
        path.write_text("quite another text, in which other pairs of letters are frequent " * 20)
    with pytest.raises(UserError, match="its corpus has changed"):
        train(replace(cfg, resume=str(tmp_path / "run")), tmp_path / "run")


# ---- where and how ----


def test_attention_that_cannot_run_is_refused_before_the_data_is_read(tmp_path):
    cfg = tiny_config(tmp_path)
    cfg = replace(
        cfg,
        attention=replace(cfg.attention, backend="flash_v2"),
        data=replace(cfg.data, files="nowhere"),
        model=replace(cfg.model, d_model=8 * cfg.model.n_head),
    )
    with pytest.raises(UserError, match="flash_v2 cannot run here: flash_v2 takes head_dim 16 to 256, not 8"):
        decide(cfg)
    with pytest.raises(UserError, match="flash_v2 cannot run here"):
        train(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    cfg = tiny_config(tmp_path)
    with pytest.raises(UserError, match=r"model\.vocab_size=100 is smaller than the tokenizer's 257"):
        train(replace(cfg, model=replace(cfg.model, vocab_size=100)), tmp_path / "run")


def test_a_prompt_longer_than_the_context_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match=r"prompt: 40 tokens are more than data\.seq_len=16"):
        train(replace(tiny_config(tmp_path), prompt="x" * 40), tmp_path / "run")


# ---- the command ----


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model.n_heads=4"], "did you mean model.n_head?"),
        (["attention=flash_v9"], "attention=flash_v9 is not a choice"),
        (["trainer.max_steps=many"], "trainer.max_steps"),
        (["model.n_kv_head=3"], "model.n_head=4 is not divisible by model.n_kv_head=3"),
        (["resume=nowhere"], "resume=nowhere: there is no run here"),
    ],
)
def test_a_mistake_in_the_configuration_costs_one_line(tmp_path, arguments, says):
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ") and says in done.stderr
    assert done.stdout == "" and not list(tmp_path.iterdir())


def test_a_missing_file_costs_one_line(tmp_path):
    done = command("data=text", "data.files=nowhere.txt", "logger=wandb", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "nowhere.txt" in errors[0]
    assert "Traceback" not in done.stderr


def test_the_command_trains_resumes_and_keeps_one_folder(tmp_path):
    cfg = tiny_config(tmp_path, max_steps=2)
    run = tmp_path / "run"
    first = command(*overrides(cfg), "logger.mode=offline", f"hydra.run.dir={run}", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "Traceback" not in first.stderr and "Warning" not in first.stderr
    again = command(f"resume={run}", "trainer.max_steps=4", "trainer.val_every=4", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resuming after step 2" in again.stdout
    assert list(values(run, "train/loss")) == [1, 2, 3, 4]
    assert len(list(run.glob("wandb/offline-run-*"))) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"text", "cache", "run"}


def test_ctrl_c_reaches_the_loading_processes_too_and_loses_nothing(tmp_path):
    cfg = tiny_config(tmp_path, max_steps=10**6, val_every=10**6, accumulate=4)
    arguments = [*overrides(replace(cfg, data=replace(cfg.data, num_workers=2))), f"hydra.run.dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > 4):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "to go on: python train.py resume=" in printed
    assert checkpoint(tmp_path / "run")["global_step"] > 3
