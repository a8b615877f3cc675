"""The front door: what reaches `main`, and one line with the nearest right one for everything that does not."""

import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import flash_ladder.front_door
from flash_ladder.composition import store_defaults
from flash_ladder.errors import UserError
from flash_ladder.files import owned
from flash_ladder.front_door import CONF, front_door, hydra_notes
from flash_ladder.schema import Config, DataConfig, with_batch_size
from flash_ladder.script_schema import (
    BenchmarkConfig,
    CertifyConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    HubKernelConfig,
    ReportConfig,
    TuneConfig,
)
from flash_ladder.sweep import launcher
from tests.helpers import commands


@pytest.fixture
def train(monkeypatch, tmp_path, capsys):
    """Calls the front door of train.py with a `main` that only listens, and begins a run; returns exit code, stderr, and what main
    was given.
    """
    monkeypatch.chdir(tmp_path)
    launcher.register()

    def call(*arguments, main=None):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        given = []
        code = 0

        def begin(cfg, folder):
            given.append((cfg, folder))
            (folder / ".hydra").mkdir(exist_ok=True)
            for name, text in hydra_notes(cfg).items():
                (folder / name).write_text(text)

        try:
            front_door("train", Config, main or begin)
        except SystemExit as stop:
            code = stop.code
        # On a slow machine a bar over the points comes and goes.
        return code, re.sub(r"\r(checking|composing):.*\r", "", capsys.readouterr().err), given

    return call


@pytest.fixture
def refused(train, tmp_path):
    def check(message, *arguments):
        code, said, given = train(*arguments)
        assert (code, given) == (2, [])
        assert said.startswith("error: ") and message in said and said.count("\n") == 1
        assert not any(tmp_path.iterdir())  # and nothing is left behind

    return check


def contents(folder):
    """The bytes of every file below a folder, by its name there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what reaches main ----


def test_defaults_are_the_schemas(train, tmp_path):
    code, said, [(cfg, folder)] = train()
    assert (code, said) == (0, "")
    assert cfg == Config()
    assert cfg.attention.backend == "auto" and cfg.prompt == "def "
    assert folder.is_dir() and folder.parents[1] == tmp_path / "outputs"  # outputs/DATE/TIME


SCHEMAS = {
    "train": Config,
    "benchmark_attention": BenchmarkConfig,
    "certify": CertifyConfig,
    "doctor": DoctorConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "generate": GenerateConfig,
    "hub_kernel": HubKernelConfig,
    "report": ReportConfig,
    "tune_tiles": TuneConfig,
}


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def options():
    """Every YAML file of conf/ and scripts/conf: its path and what it says, under the keys of its command's schema."""
    for path in CONF.rglob("*.yaml"):
        values = yaml.safe_load(path.read_text()) or {}
        group = path.parent.name
        yield path, "train", values if group in ("conf", "experiment") else {group: values}
    for path in (CONF.parent / "scripts" / "conf").glob("*.yaml"):
        yield path, path.stem, yaml.safe_load(path.read_text())


def overridden(said):
    """What the options that an experiment names (override /model: ...) set: its own values are said on top of them."""
    values = {}
    for entry in said.get("defaults", ()):
        for key, option in entry.items() if isinstance(entry, dict) else ():
            if key.startswith("override /") and (file := CONF / key.removeprefix("override /") / f"{option}.yaml").exists():
                values |= dict(leaves({key.removeprefix("override /"): yaml.safe_load(file.read_text())}))
    return values


def test_no_option_repeats_a_default():
    """A default has one home, the schema; an option file holds only what differs."""
    repeated, n_files = [], 0
    for path, command, said in options():
        options_below = overridden(said)
        said = {key: value for key, value in said.items() if key not in ("defaults", "hydra")}
        if path.stem == "command":  # what all scripts ask of Hydra
            assert not said
            continue
        defaults = dict(leaves(asdict(SCHEMAS[command]()))) | options_below
        repeated += [f"{path.name}: {key}" for key, value in leaves(said) if value == defaults.get(key)]
        n_files += 1
    assert repeated == [] and n_files > 20


@pytest.mark.parametrize("command", SCHEMAS)
def test_help_has_every_default(tmp_path, command):
    """Every key of the schema with its value, from the schema, as a user's --help shows it."""
    done = commands.run("train.py" if command == "train" else f"scripts/{command}.py", "--help", cwd=tmp_path, timeout=60)
    values = done.stdout[done.stdout.index("Values (KEY=VALUE):\n") :].split("\n\n")[0]
    assert yaml.safe_load(values.partition("\n")[2]) == asdict(SCHEMAS[command]())


def test_groups_keys_and_an_experiment(train):
    _, _, [(cfg, _)] = train("experiment=gpt2_124m", "attention=eager", "data.seq_len=512", "optimizer.lr=1e-3", "seed=7")
    assert (cfg.model.n_layer, cfg.model.n_kv_head, cfg.model.position) == (12, 12, "learned")
    assert cfg.data.seq_len == cfg.model.max_seq_len == 512  # one refers to the other
    assert (cfg.attention.backend, cfg.optimizer.lr, cfg.seed, cfg.trainer.compile) == ("eager", 1e-3, 7, True)


@pytest.mark.parametrize(("experiment", "longest", "backends"), [("seq_len_scaling", 262144, 4), ("seq_len_scaling_cpu", 2048, 2)])
def test_an_experiment_brings_the_axes_of_its_sweep(train, experiment, longest, backends):
    """As many tokens a step at every length, and no length that leaves a step uneven."""
    store_defaults(Config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        axes = compose("train", [f"experiment={experiment}"], return_hydra_config=True).hydra.sweeper.params
    assert set(axes) == {"attention", "data.seq_len"} and len(axes["attention"].split(",")) == backends
    lengths = [int(n) for n in axes["data.seq_len"].split(",")]
    assert lengths[-1] == longest
    for seq_len in lengths:
        _, said, [(cfg, _)] = train(f"experiment={experiment}", f"data.seq_len={seq_len}")
        cfg = with_batch_size(cfg, 1)
        assert said == "" and cfg.data.batch_size * cfg.trainer.accumulate * seq_len == cfg.data.tokens_per_step


@pytest.mark.parametrize("experiment", sorted(p.stem for p in (CONF / "experiment").glob("*.yaml")))
@pytest.mark.parametrize("model", sorted(p.stem for p in (CONF / "model").glob("*.yaml")))
def test_every_model_and_experiment_is_valid(train, model, experiment):
    code, said, given = train(f"model={model}", f"experiment={experiment}")
    assert (code, said, len(given)) == (0, "", 1)


@pytest.mark.parametrize("option", ["trainer=ddp", "logger.mode=disabled", "data=hub", "model.d_ff=null"])
def test_other_options_are_taken(train, option):
    assert train(option)[:2] == (0, "")


def test_files_may_be_a_path_a_glob_or_a_list(train, tmp_path, monkeypatch):
    """They are saved absolute: a run goes on, and is exported, from any folder."""
    for argument, files in (
        ("a.txt", ["a.txt"]),
        ("my/*.txt", ["my/*.txt"]),
        ("[a.txt,b.txt]", ["a.txt", "b.txt"]),
        ("a,b's (2).txt", ["a,b's (2).txt"]),
    ):
        _, said, [(cfg, folder)] = train("data=text", f"data.files={argument}", "data.cache_dir=cache")
        assert cfg.data.paths() == [str(tmp_path / file) for file in files], said
        assert cfg.data.cache_dir == str(tmp_path / "cache")
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert train(f"resume={folder}")[2][0][0].data == cfg.data
        monkeypatch.chdir(tmp_path)


def test_the_run_folder_and_its_overrides(train, tmp_path):
    _, _, [(_, folder)] = train("hydra.run.dir=here/run", "seed=3")
    assert folder == tmp_path / "here" / "run"
    assert yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text()) == ["seed=3"]


def test_exit_codes_are_mains(train):
    assert train(main=lambda cfg, folder: None)[0] == 0
    assert train(main=lambda cfg, folder: 1)[0] == 1

    def interrupted(cfg, folder):
        raise KeyboardInterrupt

    assert train(main=interrupted)[:2] == (130, "\ninterrupted\n")


PROMPTS = [
    "def ",
    "  a=b, 'c' \"d\" # e",
    "${HOME} \\${a}\\",
    "\\\\${a}\\'",
    "null",
    "",
    "[1, 2",
    "def f():\n    return '\\n'\n",
    "é 漢字",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_taken_as_it_is(train, prompt):
    assert train(f"prompt={prompt}")[2][0][0].prompt == prompt


# ---- what does not ----


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("sed=1", "sed is not a key; did you mean seed?"),
        ("data.seq_ln=64", "data.seq_ln is not a key; did you mean data.seq_len?"),
        ("seq_len=64", "seq_len is not a key; did you mean"),
        ("zzzzz=1", "zzzzz is not a key; --help lists them"),
        ("+colour=red", "colour is not a key"),
        ("+model.colour=red", "model.colour is not a key"),
        (
            "attention=flash",
            "attention=flash is not a choice (auto, eager, flash_v1, flash_v2, flash_v3, sdpa); did you mean flash_v3?",
        ),
        (
            "attention.backend=egaer",
            "attention.backend=egaer is not a choice (auto, eager, sdpa, flash_v1, flash_v2, flash_v3); did you mean eager?",
        ),
        ("model=gpt2", "did you mean gpt2_"),
        ("experiment=gpt2_124", "did you mean gpt2_124m?"),
        ("experiment=null", "experiment=None is not a choice (gpt2_124m"),
        ("seed=x", "seed: value 'x'"),
        ("data.seq_len=1.5", "data.seq_len: value '1.5'"),
        ("model.bias=maybe", "model.bias: value 'maybe'"),
        ("optimizer.lr=fast", "optimizer.lr: value 'fast'"),
        ("seed", "seed is not KEY=VALUE; --help lists the keys"),
        ("seed=a(b)", "seed=a(b) cannot be read: such a value needs quotes that the shell leaves on, 'seed='\"'\"'a(b)'\"'\"''"),
        ("data.files=['a]", "a text with such characters needs quotes of its own in a list, \"data.files=['a, b','c']\""),
        ("seed=???", "seed=??? says that the value is missing"),
        ("seed=1,2", "seed=1,2 names several values: add -m to run each"),
        ("model.max_seq_len=${data.sqe_len}", "sqe_len"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_right_one(refused, argument, message):
    refused(message, argument)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("model.d_model=130", "d_model=128 would work"),
        ("model.n_kv_head=3", "n_kv_head can be 1, 2, 4"),
        ("model.d_model=36 model.n_head=4", "head_dim = d_model / n_head = 9 must be even"),
        (
            "model.position=learned model.max_seq_len=64 data.seq_len=65",
            "data.seq_len=65 is longer than the learned",
        ),
        ("model.n_layer=0", "model.n_layer=0 must be at least 1"),
        ("model.vocab_size=1", "model.vocab_size=1 must be at least 2"),
        ("model.norm=batchnorm", "model.norm=batchnorm is not a choice (rmsnorm, layernorm)"),
        ("model.mlp=relu", "model.mlp=relu is not a choice"),
        ("model.position=absolute", "model.position=absolute is not a choice"),
        ("data.source=web", "data.source=web is not a choice"),
        ("data=text", "data=text needs data.files=PATH"),
        ("data.files=/a.txt", "data.files=/a.txt is for data=text"),
        ("data=text data.files=['a',{b:c}]", "data.files=['a', {'b': 'c'}] must be a path, a glob or a list"),
        ("data=hub data.hub_name=null", "data=hub needs data.hub_name"),
        ("data.streaming=true", "data.streaming=true is for data=hub"),
        ("data.val_fraction=1", "data.val_fraction=1.0 must lie between 0 and 1"),
        ("data.vocab_size=256", "so at least 257"),
        ("data.tokenizer=words", "data.tokenizer=words is not a choice"),
        ("data.batch_size=0", "data.batch_size=0 must be at least 1"),
        ("optimizer.lr=-1", "optimizer.lr=-1.0 must be at least 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan is not a finite number"),
        ("optimizer.beta2=1", "optimizer.beta2=1.0 must lie in [0, 1)"),
        ("optimizer.min_lr_ratio=2", "optimizer.min_lr_ratio=2.0 must lie in [0, 1]"),
        ("trainer.precision=fp8", "trainer.precision=fp8 is not a choice"),
        ("trainer.accelerator=tpu", "trainer.accelerator=tpu is not a choice"),
        ("trainer.strategy=deepspeed", "trainer.strategy=deepspeed is not a choice"),
        ("trainer.devices=0", "trainer.devices=0 must be a number of devices"),
        ("trainer.max_steps=0", "trainer.max_steps=0 must be at least 1"),
        ("logger.mode=on", "logger.mode"),
    ],
)
def test_what_cannot_work_is_refused(refused, arguments, message):
    refused(message, *arguments.split(" "))


def test_an_output_folder_that_cannot_be_made_is_refused(refused, tmp_path_factory):
    file = tmp_path_factory.mktemp("other") / "file"
    file.touch()
    refused(
        f"the output folder {file}/run cannot be written (Not a directory); set hydra.run.dir=PATH", f"hydra.run.dir={file}/run"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_that_cannot_be_written_is_refused(refused, tmp_path_factory):
    folder = tmp_path_factory.mktemp("read_only")
    folder.chmod(0o555)
    refused("permission denied", f"hydra.run.dir={folder}")


# ---- several runs, and one that goes on ----


def test_a_sweep_runs_every_point(train):
    code, said, given = train("-m", "seed=1,2", "model.n_layer=range(1,3)", "hydra/launcher=basic")
    assert (code, said) == (0, "")
    assert [(cfg.seed, cfg.model.n_layer) for cfg, _ in given] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert len({folder for _, folder in given}) == 4


def test_a_sweep_that_cannot_begin_is_refused(refused):
    refused("did you mean eager?", "-m", "attention=egaer,sdpa")
    refused("did you mean sdpa?", "-m", "attention=eager,sdap")
    refused("model.n_head=3: model.d_model=128 is not divisible", "-m", "model.n_head=4,3,2")
    refused("n_kv_head can be 1, 2, 4", "-m", "model.n_kv_head=3,4")


def test_under_hydras_own_launcher_a_bad_point_is_not_the_end(train):
    given = []

    def main(cfg, folder):
        given.append(cfg.seed)
        if cfg.seed == 1:
            raise UserError("not finite")

    code, said, _ = train("-m", "seed=1,2,3", "hydra/launcher=basic", main=main)
    assert code == 1 and given == [1, 2, 3]
    assert said.startswith("error: not finite\n") and "Traceback" not in said


@pytest.mark.parametrize("flags", [[], ["-m"]])
def test_hydras_own_values_pass(train, tmp_path, flags):
    """Also one whose default refers to what only a running job has, an option that is in no folder of ours, and other folders."""
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "wide.yaml").write_text("d_model: 256\n")
    mine = f"hydra.searchpath=[file://{tmp_path}/mine]"
    code, said, [(cfg, folder)] = train(*flags, "hydra.sweep.subdir=abc", "hydra/launcher=basic", mine, "model=wide")
    assert (code, said, cfg.model.d_model) == (0, "", 256)
    assert (folder.name == "abc") == bool(flags)


def test_keys_of_hydras_are_not_ours(refused):
    refused("Could not find 'hydra/launcher/slrm' Available options in 'hydra/launcher': basic processes", "hydra/launcher=slrm")
    refused("hydrax is not a key", "hydrax=1")


def test_a_sweep_makes_its_own_folder_alone(train, tmp_path):
    train("-m", "seed=1", "hydra/launcher=basic", "hydra.sweep.dir=s", "hydra.run.dir=r")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_globs_and_ranges_are_sweeps(train):
    _, said, given = train("-m", "attention=glob(flash_v*)", "model.n_layer=range(1,3)", "hydra/launcher=basic")
    assert said == "" and [cfg.attention.backend for cfg, _ in given] == ["flash_v1"] * 2 + ["flash_v2"] * 2 + ["flash_v3"] * 2


def test_runs_of_the_same_second_have_folders_of_their_own(train, tmp_path, monkeypatch):
    OmegaConf.register_new_resolver("now", lambda pattern: "now", replace=True)
    monkeypatch.setattr("hydra.core.utils.setup_globals", lambda: None)
    monkeypatch.setattr("hydra._internal.hydra.setup_globals", lambda: None)
    folders = [train()[2][0][1] for _ in range(3)]
    assert [folder.name for folder in folders] == ["now", "now_2", "now_3"]
    OmegaConf.clear_resolver("now")


@dataclass
class Lightning:
    lightning: dict[str, Any] = field(default_factory=dict)


@dataclass
class Open:
    """A schema with a place for another library's keys."""

    seed: int = 0
    trainer: Lightning = field(default_factory=Lightning)

    def validate(self):
        pass


def test_another_librarys_keys_are_added_with_a_plus(monkeypatch, tmp_path, capsys):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "open.yaml").write_text("defaults:\n  - schema\n  - _self_\nhydra:\n  output_subdir: null\n")
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        given = []
        monkeypatch.setattr(sys, "argv", ["open.py", *arguments])
        front_door("open", Open, lambda cfg, folder: given.append(cfg.trainer.lightning), conf=tmp_path / "conf")
        return given

    assert call("+trainer.lightning.limit_train_batches=4") == [{"limit_train_batches": 4}]
    assert call("-m", "+trainer.lightning.limit_train_batches=4,8") == [{"limit_train_batches": n} for n in (4, 8)]
    with pytest.raises(SystemExit):
        call("trainer.lightning.limit_train_batches=4")
    assert (
        "trainer.lightning.limit_train_batches is not set yet; +trainer.lightning.limit_train_batches=VALUE"
        in capsys.readouterr().err
    )


def test_a_folder_with_any_name_can_be_resumed(train, tmp_path):
    for name in ("lr=0.1,b=(2)", "12e4567", "ü #$'{x}", "${HOME}", "a\"b'c & d|e;[f]~"):
        folder = tmp_path / name
        train(f"hydra.run.dir={folder}".replace("${", "\\${"), "seed=5")
        _, said, [(cfg, resumed)] = train(f"resume={folder}")
        assert said == "" and (cfg.seed, cfg.resume, resumed) == (5, str(folder), folder)


def test_the_processes_that_ddp_starts_are_typed_what_the_user_typed(train):
    """Lightning starts them with sys.argv, and they read it as this process did."""
    typed = []
    train("prompt=it's, ${x}", "seed=3", "hydra.run.dir=r", main=lambda cfg, folder: typed.extend(sys.argv[1:]))
    assert typed == ["prompt=it's, ${x}", "seed=3", "hydra.run.dir=r", "hydra.run.dir='r'"]


def test_resume_takes_the_runs_own_values_and_then_the_new_ones(train, tmp_path):
    train("hydra.run.dir=run", "data.seq_len=64", "trainer.max_steps=10", 'prompt=it\'s, "x" = ${y}')
    _, said, [(cfg, folder)] = train("resume=run", "trainer.max_steps=20")
    assert said == "" and folder == tmp_path / "run"
    assert (cfg.data.seq_len, cfg.trainer.max_steps, cfg.resume, cfg.prompt) == (64, 20, "run", 'it\'s, "x" = ${y}')
    _, _, [(cfg, folder)] = train("resume=run")  # again: what the second call added is kept
    assert (folder, cfg.data.seq_len, cfg.trainer.max_steps, cfg.resume) == (tmp_path / "run", 64, 20, "run")


REACHING_CODE = [
    "+hydra.callbacks.x={_target_: pathlib.Path.touch, self: evil}",
    "hydra.job.env_set={PYTHONPATH: evil}",
    "hydra/job_logging=evil",
    "hydra.searchpath=[file:///evil]",
    "callbacks=../../evil",
    "+callbacks.x._target_=evil.Class",
    "callbacks@hydra.callbacks=early_stopping",
    "+trainer.lightning.model_registry=evil",
    "slurm.setup=[evil]",
]


@pytest.mark.parametrize("override", REACHING_CODE)
def test_a_run_of_somebody_else_brings_values_and_no_code(train, tmp_path, override):
    train("hydra.run.dir=run", "data.seq_len=64")
    saved = tmp_path / "run" / ".hydra" / "overrides.yaml"
    written = yaml.safe_dump([*yaml.safe_load(saved.read_text()), override])
    saved.write_text(written)
    code, said, given = train("resume=run")
    assert (code, given) == (2, []) and said.count("\n") == 1
    assert "where you trust them, type them again after resume=run" in said
    assert saved.read_text() == written and not (tmp_path / "evil").exists()


def test_what_reaches_code_is_taken_from_the_command_line_alone(train, tmp_path):
    mine = "+callbacks.mine._target_=my.Class"
    train("hydra.run.dir=run", "data.seq_len=64", "callbacks=early_stopping", mine, "+trainer.lightning.max_epochs=2")
    assert train("resume=run", mine)[0] == 2
    for _ in range(2):  # what a resumed run was given is typed again too
        _, said, [(cfg, _)] = train("resume=run", mine, "+trainer.lightning.max_epochs=3")
        assert said == "" and cfg.callbacks.keys() == {"early_stopping", "mine"} and cfg.trainer.lightning == {"max_epochs": 3}


ALIASES = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize("text", [ALIASES, "!!python/object/apply:os.system [true]", "[" * 9999, "- 5", "seed: 1", "\x00", "- x=["])
def test_a_damaged_list_of_overrides_is_one_line(train, tmp_path, text):
    train("hydra.run.dir=run")
    (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text(text)
    code, said, given = train("resume=run")
    assert (code, given) == (2, []) and said.startswith("error: ") and said.count("\n") == 1


def test_a_refused_resume_leaves_the_run_as_it_was(train, tmp_path):
    """What main refuses (a checkpoint of another shape, say) is not what the run is resumed with next time; and a traceback."""
    train("hydra.run.dir=run", "data.seq_len=64")
    before = contents(tmp_path / "run")
    assert set(before) == {".lock", ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"}

    def refuse(cfg, folder):
        raise UserError("another model")

    def fail(cfg, folder):
        raise ZeroDivisionError

    assert train("resume=run", "model.n_layer=9", main=refuse)[:2] == (2, "error: another model\n")
    assert train("resume=run", "model.n_layer=9", main=fail)[0] == 1
    assert contents(tmp_path / "run") == before


def test_a_folder_that_another_process_is_at_is_refused_and_left_alone(train, tmp_path):
    train("hydra.run.dir=run")
    before = contents(tmp_path / "run")
    (tmp_path / "new").mkdir()
    with owned(tmp_path / "run"), owned(tmp_path / "new"):
        for argument in ("resume=run", "hydra.run.dir=new"):  # the second one has begun in the same second, and written nothing
            code, said, given = train(argument)
            assert (code, given) == (2, []) and said.count("\n") == 1 and "is another process's, which still runs" in said
    assert contents(tmp_path / "run") == before and (tmp_path / "new").is_dir()
    assert train("resume=run")[0] == train("hydra.run.dir=new")[0] == 0


def test_a_lock_dies_with_its_process(train, tmp_path):
    hold = "import sys, time; from flash_ladder.files import *\nwith owned(Path(sys.argv[1])): print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout.read(1) == b"1"
    with pytest.raises(UserError, match="another process"), owned(tmp_path):
        pass
    process.kill()
    process.wait()
    with owned(tmp_path):
        pass


def test_a_run_that_never_began_leaves_no_folder(train, tmp_path):
    """What main refuses before it has written anything; what it has written stays."""

    def refuse(cfg, folder):
        raise UserError("no such file")

    def write_and_refuse(cfg, folder):
        (folder / "metrics.jsonl").write_text("{}")
        raise UserError("not finite")

    def interrupted(cfg, folder):
        raise KeyboardInterrupt

    assert train("hydra.run.dir=a", main=refuse)[0] == train("hydra.run.dir=b", main=write_and_refuse)[0] == 2
    assert train("hydra.run.dir=c", main=interrupted)[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["b"] and (tmp_path / "b" / "metrics.jsonl").exists()


def test_the_clock_is_read_once(train, tmp_path, monkeypatch):
    """The run's folder is named after the second in which it was checked, and no other is made a second later."""
    make = flash_ladder.front_door.make_writable
    monkeypatch.setattr(flash_ladder.front_door, "make_writable", lambda *asked: (make(*asked), time.sleep(1.1)))
    _, _, [(_, folder)] = train()
    assert [p for p in (tmp_path / "outputs").glob("*/*") if p.is_dir()] == [folder]


def test_resume_of_nothing_is_refused(refused):
    refused("resume=none: there is no run here (no none/.hydra/overrides.yaml)", "resume=none")


@pytest.mark.parametrize("flag", ["--help", "--cfg"])
def test_help_lists_the_choices(train, capsys, monkeypatch, flag):
    written = []
    monkeypatch.setattr(sys.stdout, "write", written.append)
    code, _, given = train(*{"--help": ["--help"], "--cfg": ["--cfg", "job"]}[flag])
    said = "".join(written)
    assert code == 0 and given == []
    if flag == "--help":
        assert "attention: auto, eager, flash_v1, flash_v2, flash_v3, sdpa" in said
        assert "model: gpt2_124m, gpt2_350m, llama_1b, tiny" in said
        assert "python train.py resume=outputs/DATE/TIME" in said
    assert f"seq_len: {DataConfig().seq_len}" in said


def test_a_group_takes_several_options(train):
    _, _, [(cfg, _)] = train("callbacks=[early_stopping,model_summary]")
    assert set(cfg.callbacks) == {"early_stopping", "model_summary"}
    code, said, _ = train("callbacks=[early_stoping]")
    assert code == 2 and "did you mean early_stopping?" in said


def test_a_folder_that_holds_a_run_is_not_touched(train, tmp_path):
    train("hydra.run.dir=run", "seed=1")
    (tmp_path / "run" / "metrics.jsonl").touch()
    before = contents(tmp_path / "run")
    code, said, _ = train("hydra.run.dir=run", "seed=2")
    assert code == 2 and "holds a run already" in said
    assert contents(tmp_path / "run") == before and ".hydra/overrides.yaml" in before
