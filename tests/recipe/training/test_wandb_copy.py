"""flash_ladder.training.wandb_copy: what wandb's own offline file holds of a run, and that a dead or broken wandb costs nothing."""

import os
import signal
import time

import pytest
import torch
import wandb

from flash_ladder.errors import UserError
from flash_ladder.measure.probe import Layer, Probe
from flash_ladder.processes import children
from flash_ladder.schema import LoggerConfig
from flash_ladder.training import wandb_copy
from flash_ladder.training.wandb_copy import check_wandb, continue_wandb, open_wandb, recorded_run, savings
from tests.helpers.wandb_file import WandbFile, segments

OFFLINE = LoggerConfig(mode="offline")
GIB = 2**30
PROBE = Probe(Layer(8, 4, 2, 128, 32, torch.float32, torch.device("cpu")), "sdpa", GIB, 0.5, 4 * GIB, 1.0, False)


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No WANDB_* variable of the machine, and none that an earlier test has left in wandb's settings."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # wandb reads ./wandb/settings
    wandb.teardown()
    yield
    wandb.teardown()


def logged(run_dir, cfg=OFFLINE, steps=(), config=None):
    """The file of a run that logged `steps`, a step and its metrics each."""
    copy = open_wandb(cfg, run_dir, config or {})
    for step, metrics in steps:
        copy.log_metrics(metrics, step)
    return ended(copy)


def ended(copy):
    """The file of a run that is closed here, once wandb's service has written all of it."""
    copy.close()
    wandb.teardown()
    return WandbFile(segments(copy.run_dir)[-1])


def next_second():
    """Waits until wandb would give a run that goes on another folder: it names them by the second."""
    time.sleep(1 - time.time() % 1)


# ---- what the file holds ----


def test_the_optimiser_step_is_the_axis_of_every_metric(tmp_path):
    steps = [(10, {"train/loss": 3.0}), (20, {"train/loss": 2.0}), (20, {"val/loss": 2.5})]
    file = logged(tmp_path, steps=steps)
    (every,) = [metric for metric in file.metrics if metric.glob_name == "*"]
    assert every.step_metric == "trainer/global_step" and every.options.step_sync
    assert file.values("train/loss") == [(10, 3.0), (20, 2.0)] and file.values("val/loss") == [(20, 2.5)]
    assert [row["_step"] for row in file.rows] == [10, 20]  # wandb's own count of rows says the same


def test_the_best_validation_is_in_the_summary_also_after_a_resume(tmp_path):
    file = logged(tmp_path, steps=[(10, {"val/loss": 2.0}), (20, {"val/loss": 1.0}), (30, {"val/loss": 3.0})])
    assert (file.summary["val/loss"], file.summary["val/best_loss"], file.summary["val/best_step"]) == (3.0, 1.0, 20)
    (tmp_path / "metrics.jsonl").write_text('{"step": 20, "time": 1, "val/loss": 1.0}\n{"step": 20, "time": 2, "train/lr": 0.1}\n')
    next_second()
    again = logged(tmp_path, steps=[(40, {"val/loss": 2.0})])
    assert again.run.run_id == file.run.run_id and len(segments(tmp_path)) == 2
    assert (again.summary["val/loss"], again.summary["val/best_loss"], again.summary["val/best_step"]) == (2.0, 1.0, 20)
    assert again.summary["train/lr"] == 0.1 and "time" not in again.summary


def test_a_step_that_a_resumed_run_repeats_is_not_dropped(tmp_path):
    file = logged(tmp_path, steps=[(10, {"train/loss": 3.0}), (30, {"train/loss": 2.0}), (20, {"val/loss": 2.5})])
    assert file.summary["val/loss"] == 2.5 and file.rows[-1]["_step"] == 30


def test_names_group_and_tags(tmp_path):
    keys = {"project": "p", "entity": "e", "name": "n", "group": "2026-11-30/04-00-00", "job_type": "train", "notes": "a note"}
    run = logged(tmp_path, LoggerConfig(mode="offline", tags=["a", "b"], **keys), config={"attention": {"backend": "sdpa"}}).run
    assert (run.project, run.entity, run.display_name, run.run_group) == ("p", "e", "n", "2026-11-30/04-00-00")
    assert (run.job_type, run.notes, list(run.tags)) == ("train", "a note", ["a", "b"])
    known = recorded_run(tmp_path)
    assert known == keys | {"id": run.run_id, "mode": "offline", "tags": ["a", "b"], "config": {"attention": {"backend": "sdpa"}}}


def test_environment_variables_are_obeyed_where_the_configuration_is_silent(tmp_path, monkeypatch):
    variables = {"PROJECT": "p", "ENTITY": "e", "NAME": "n", "RUN_GROUP": "g", "TAGS": "a,b", "NOTES": "o", "JOB_TYPE": "j"}
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = logged(tmp_path / "env", LoggerConfig()).run
    assert (run.project, run.entity, run.display_name, run.run_group) == ("p", "e", "n", "g")
    assert (run.job_type, run.notes, list(run.tags)) == ("j", "o", ["a", "b"])
    run = logged(tmp_path / "asked", LoggerConfig(project="mine", tags=[])).run
    assert (run.project, run.display_name, list(run.tags)) == ("mine", "n", [])


@pytest.mark.parametrize(
    ("asked", "variable", "sweep", "mode"),
    [
        (None, None, None, "offline"),
        (None, "online", None, "online"),
        (None, "run", None, "online"),
        (None, "dryrun", None, "offline"),
        ("offline", "online", None, "offline"),
        ("online", "offline", None, "online"),
        (None, None, "abc", "online"),
        (None, "offline", "abc", "offline"),
        ("offline", None, "abc", "offline"),
    ],
)
def test_the_mode_is_asked_for_or_the_variable_or_the_recipes(tmp_path, monkeypatch, asked, variable, sweep, mode):
    modes = []

    def init(mode, **about):
        modes.append(mode)
        raise wandb.Error("enough")

    monkeypatch.setattr(wandb, "init", init)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    if sweep:
        monkeypatch.setenv("WANDB_SWEEP_ID", sweep)
    assert open_wandb(LoggerConfig(mode=asked), tmp_path, {}) is None
    assert modes == ["offline"] if mode == "offline" else modes == ["online", "offline"]


def test_wandbs_own_settings_file_is_obeyed(tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nproject = theirs\nmode = disabled\n")
    assert open_wandb(LoggerConfig(), tmp_path / "run", {}) is None
    assert logged(tmp_path / "run").run.project == "theirs"


def test_the_default_project(tmp_path):
    assert logged(tmp_path).run.project == "flash-ladder"


@pytest.mark.parametrize("variables", [{}, {"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}])
def test_disabled_leaves_nothing(tmp_path, monkeypatch, variables):
    cfg = LoggerConfig(mode=None if variables else "disabled")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert open_wandb(cfg, tmp_path, {}) is None
    assert not list(tmp_path.iterdir())


# ---- tables and pictures ----


def test_what_a_layer_saves_as_a_table_and_bars(tmp_path):
    copy = open_wandb(OFFLINE, tmp_path, {})
    copy.log_savings(PROBE, 0)
    copy.log_sample("def ", "def f(x)", 8)
    file = ended(copy)
    (row,) = file.table("memory/attention_savings")
    assert (row["backend"], row["memory GiB"], row["eager memory GiB"], row["saved GiB"], row["ratio"]) == ("sdpa", 1, 4, 3, 4)
    assert (row["time ms"], row["eager time ms"], row["speed-up"]) == (500, 1000, 2)
    bars = file.table("memory/attention_bars_table")
    assert bars == [{"attention": "sdpa", "GiB": 1}, {"attention": "eager", "GiB": 4}]
    assert [bar["ms"] for bar in file.table("speed/attention_bars_table")] == [500, 1000]
    assert file.table("val/sample") == [{"step": 8, "prompt": "def ", "text": "def f(x)"}]


def test_bars_of_what_was_not_measured_are_left_out_or_marked():
    guessed = savings(Probe(PROBE.layer, "flash_v2", GIB, None, 4 * GIB, None, True))
    assert set(guessed) == {"memory/attention_savings", "memory/attention_bars"}
    assert guessed["memory/attention_bars"].table.data == [["flash_v2", 1.0], ["eager (at least)", 4.0]]
    alone = savings(Probe(PROBE.layer, "eager", GIB, 1.0, GIB, 1.0, False))
    assert alone["memory/attention_bars"].table.data == [["eager", 1.0]]


def test_an_evaluation_joins_the_run_behind_its_last_row(tmp_path):
    first = logged(tmp_path, LoggerConfig(mode="offline", group="g"), [(20, {"val/loss": 1.0})], config={"seed": 1})
    (tmp_path / "metrics.jsonl").write_text('{"step": 20, "time": 1, "val/loss": 1.0}\n')
    next_second()
    copy = continue_wandb(tmp_path, recorded_run(tmp_path), None)
    copy.log_evaluation({"backend": "sdpa", "loss": 1.25}, {"eval/loss": 1.25}, step=10)
    file = ended(copy)
    assert (file.run.run_id, file.run.run_group, file.config["seed"]) == (first.run.run_id, "g", 1)
    assert file.values("eval/loss") == [(10, 1.25)] and file.rows[0]["_step"] == 21
    assert file.summary["val/loss"] == 1.0 and file.table("eval/parity") == [{"backend": "sdpa", "loss": 1.25}]


def test_an_evaluation_of_an_offline_run_stays_offline_unless_asked(tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(wandb, "init", lambda mode, **about: modes.append(mode) or 1 / 0)
    for known, variable, asked in [("offline", None, None), ("online", "offline", None), ("online", "online", "offline")]:
        if variable:
            monkeypatch.setenv("WANDB_MODE", variable)
        assert continue_wandb(tmp_path, {"id": "abc", "mode": known}, asked) is None
    assert modes == ["offline"] * 3


# ---- wandb agent ----


def test_a_run_of_wandb_agent_takes_the_agents_id_and_leaves_stopping_to_it(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "run456")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "id").write_text("earlier")  # such as of a run that is resumed
    copy = open_wandb(LoggerConfig(mode="offline"), tmp_path, {"seed": 1})
    before = signal.signal(signal.SIGINT, lambda *_: pytest.fail("the agent stops its runs itself, with SIGTERM"))
    copy.run.settings.stop_fn()
    signal.signal(signal.SIGINT, before)
    run = ended(copy).run
    assert (run.run_id, run.sweep_id) == ("run456", "sweep123")
    assert recorded_run(tmp_path)["id"] == "run456"


def test_an_id_in_the_environment_comes_before_the_folders(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run.json").write_text('{"id": "earlier"}')
    monkeypatch.setenv("WANDB_RUN_ID", "run456")
    assert logged(tmp_path).run.run_id == "run456"


def test_an_id_that_an_earlier_version_left_is_taken(tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "id").write_text("earlier")
    assert logged(tmp_path).run.run_id == "earlier"


# ---- what the closing report says ----


def test_how_to_look_names_commands_of_the_installed_version(tmp_path, monkeypatch):
    from wandb.cli.cli import cli

    copy = open_wandb(OFFLINE, tmp_path / "a run", {})
    line = copy.how_to_look()
    assert ("wandb leet 'a run/wandb'" in line) == ("leet" in cli.commands)
    assert "wandb sync 'a run'/wandb/offline-run-*" in line and "sync" in cli.commands and "WANDB_RESUME" not in line
    (tmp_path / "a run" / "wandb" / "offline-run-2").mkdir()
    assert "WANDB_RESUME=allow wandb sync" in copy.how_to_look()
    monkeypatch.setattr(wandb, "__version__", "0.27.3")
    assert "leet" not in copy.how_to_look()
    copy.close()


# ---- faults ----


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("WANDB_MODE", "garbage", "mode=garbage"),
        ("WANDB_MODE", "", "mode="),
        ("WANDB_SILENT", "maybe", "silent=maybe"),
        ("WANDB_BASE_URL", "localhost:8080", "base_url=localhost:8080"),
        ("WANDB_INIT_TIMEOUT", "garbage", "init_timeout=garbage"),
        ("WANDB_X_STATS_SAMPLING_INTERVAL", "garbage", "x_stats_sampling_interval=garbage"),
        ("WANDB_SERVICE", "garbage", "WANDB_SERVICE='garbage'"),
        ("WANDB_RUN_ID", "a/b:c", "Run ID"),
        ("WANDB_PROJECT", "a/b", "Invalid project name"),
    ],
)
def test_a_variable_that_wandb_refuses_costs_a_warning(tmp_path, monkeypatch, capsys, variable, value, said):
    monkeypatch.setenv(variable, value)
    check_wandb(LoggerConfig())
    assert open_wandb(LoggerConfig(), tmp_path, {}) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: wandb could not start (") and said in line


def test_a_key_that_wandb_refuses_is_one_line():
    for cfg in (LoggerConfig(tags=[""]), LoggerConfig(project="a/b")):
        with pytest.raises(UserError, match="wandb refuses a value"):
            check_wandb(cfg)
    check_wandb(LoggerConfig(mode="disabled", project="a/b"))


def test_without_a_home_the_service_says_nothing_on_the_screen(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("WANDB_CACHE_DIR", raising=False)
    assert logged(tmp_path, steps=[(1, {"train/loss": 1.0})]).values("train/loss") == [(1, 1.0)]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_service_that_dies_or_hangs_costs_one_warning_and_a_bounded_wait(tmp_path, monkeypatch, capfd, signum):
    monkeypatch.setattr(wandb_copy, "CALL_TIMEOUT", 0.5)
    monkeypatch.setattr(wandb_copy, "FINISH_TIMEOUT", 0.5)
    copy = open_wandb(OFFLINE, tmp_path, {})
    (service,) = children(wandb_copy.SERVICE)
    os.kill(service, signum)
    start = time.monotonic()
    for step in range(1, 4):
        copy.log_metrics({"train/loss": 1.0}, step)
    copy.close()
    assert time.monotonic() - start < 10 and not children(wandb_copy.SERVICE)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: wandb stopped working (") and line.endswith("; metrics.jsonl goes on")
    next_second()
    assert logged(tmp_path, steps=[(5, {"train/loss": 2.0})]).values("train/loss") == [(5, 2.0)]  # nothing of it is left over


def test_a_dead_server_costs_a_bounded_wait_and_one_warning(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_copy, "INIT_TIMEOUT", 2)
    start = time.monotonic()
    logged(tmp_path, LoggerConfig(mode="online"), [(1, {"train/loss": 1.0})])
    assert time.monotonic() - start < 15
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1 and "wandb is offline" in warnings[0] and "`wandb sync" in warnings[0]
    assert recorded_run(tmp_path)["mode"] == "online"


def test_wandb_failing_on_the_way_is_left_behind(tmp_path, monkeypatch, capsys):
    copy = open_wandb(OFFLINE, tmp_path, {})

    def broken(*args, **kwargs):
        raise ConnectionResetError("its service died")

    monkeypatch.setattr(type(copy.run), "log", broken)
    for step in (1, 2):
        copy.log_metrics({"train/loss": 1.0, "val/loss": 1.0}, step)
    copy.log_sample("", "", 2)
    assert capsys.readouterr().err == "warning: wandb stopped working (its service died); metrics.jsonl goes on\n"
    monkeypatch.undo()
    copy.close()


def test_wandb_that_cannot_start_is_done_without(tmp_path, monkeypatch, capsys):
    def broken(**kwargs):
        raise RuntimeError("no service here")

    for function in ("init", "setup"):
        monkeypatch.setattr(wandb, function, broken if function == "init" else lambda *_: broken())
        check_wandb(OFFLINE)
        assert open_wandb(OFFLINE, tmp_path, {}) is None
        assert capsys.readouterr().err == "warning: wandb could not start (no service here); going on without it\n"
