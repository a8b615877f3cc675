"""Bad and odd inputs: each is one line (what, why, what would work), exit code 2, and nothing is left behind.

tests/trials/inputs.py draws fresh ones by the hundred.
"""

import shlex
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
from omegaconf import OmegaConf

from flash_ladder.composition import parse
from flash_ladder.data.sources import read_files, user_files
from flash_ladder.errors import UserError, argument, at_least, nearest
from flash_ladder.files import check_file, replace_folder, write_json
from flash_ladder.front_door import CONF, front_door
from flash_ladder.memory import machine_memory, must_fit
from flash_ladder.model_schema import ModelConfig
from flash_ladder.overrides import text_keys
from flash_ladder.schema import Config
from flash_ladder.sweep import launcher
from tests.recipe.test_front_door import SCHEMAS
from tests.recipe.test_overrides import NASTY


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Calls a command's front door with a `main` that only listens; returns exit code, stderr and what main was given.

    The machine has 16 GiB.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flash_ladder.memory.machine_memory", lambda: 2**34)
    launcher.register()

    def run(command, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *arguments])
        given, code = [], 0
        conf = CONF if command == "train" else CONF.parent / "scripts" / "conf"
        try:
            front_door(command, SCHEMAS[command], lambda cfg, folder: given.append((cfg, folder)), conf)
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err, given

    return run


REFUSED = [
    # values
    ("train seed=-1", "seed=-1 must be at least 0"),
    ("train seed=99999999999999999999", "seed: 99999999999999999999 is beyond 64 bits; at most 9223372036854775807"),
    (f"train seed={'9' * 5000}", "cannot be read: a number has at most 64 bits here, about 19 digits"),
    ("train trainer.devices=two", "trainer.devices=two must be a number, or auto"),
    ("train trainer.max_steps=10000000000000000000000", "trainer.max_steps: 10000000000000000000000 is beyond 64 bits"),
    ("train data.text_column=", "data.text_column is empty; leave it out, or give it a value"),
    ("train logger.tags=[a,'']", "logger.tags is empty"),
    ("train model.norm_eps=inf", "model.norm_eps=inf is not a finite number"),
    ("train model.rope_theta=1e400", "model.rope_theta=inf is not a finite number"),
    ("train optimizer.grad_clip=inf", "optimizer.grad_clip=inf is not a finite number"),
    ("train trainer.timeout_seconds=inf", "trainer.timeout_seconds=inf is not a finite number"),
    ("train model.n_head=10000000000 model.d_model=10000000000 model.n_kv_head=3", "n_kv_head can be 1, 2, 4"),
    ("train precision=16-mixed", "precision is not a key; did you mean trainer.precision?"),
    ("train prompt=\udcff", "prompt: its bytes are not UTF-8"),
    ("train logger.kind=a\nb", "logger.kind=a\\nb is not a choice"),
    ("export out= run=r", "out is empty"),
    ("evaluate out= model=m", "out is empty"),
    ("generate model=m temperature=inf", "temperature=inf is not a finite number"),
    ("generate model=m seed=99999999999999999999", "is beyond 64 bits"),
    ("generate model=m prompt=\udcff", "prompt: its bytes are not UTF-8"),
    ("doctor softcap=inf", "softcap=inf is not a finite number"),
    # one sequence over several devices
    (
        "train trainer.context_parallel=3",
        "does not divide model.n_head=4: in attention each device has an equal share",
    ),
    ("train trainer.context_parallel=3", "it can be 1, 2, 4"),
    ("train trainer.context_parallel=4 data.seq_len=126", "each device has an equal part of the positions; data.seq_len=128 would"),
    ("train trainer.context_parallel=0", "trainer.context_parallel=0 must be at least 1"),
    (
        "train trainer.activation_checkpointing=keep",
        "keep is not a choice (false, true, keep_attention); did you mean",
    ),
    # memory
    ("train model.d_model=100000000", "would take 1.6e+06 TiB, and this machine has 16 GiB; a smaller one would fit"),
    (
        "train model.n_layer=1000000",
        "a model of 196,864,033,024 parameters (model.d_model=128, model.n_layer=1000000, vocabulary 257)",
    ),
    ("train model.vocab_size=100000000000", "vocabulary 100,000,000,000) would take 46.6 TiB, and this machine has 16 GiB"),
    ("train data.batch_size=100000000", "a batch of tokens at data.seq_len=128 would take 96.1 GiB, and this machine has 16 GiB"),
    ("train data.seq_len=1000000000000", "a batch of tokens at data.seq_len=1000000000000 would take 58.2 TiB"),
    ("train data.tokens_per_step=1000000000000000", "would take"),
    ("train trainer.devices=100000", "trainer.devices=100000: that many processes would take 19.1 TiB"),
    ("train data.num_workers=1000000", "data.num_workers=1000000: that many processes would take 15.3 TiB"),
    ("train data.num_proc=1000000", "data.num_proc=1000000: that many processes would take 15.3 TiB"),
    # types
    ("train trainer.lightning=3", "trainer.lightning: cannot assign int to Dict[str, Any]"),
    ("train trainer.lightning=${seed}", "trainer.lightning: cannot assign int to Dict[str, Any]"),
    ("train trainer.lightning=${trainer}", "trainer.lightning: interpolation to parent node detected"),
    ("train data.weights={a:1}", "data.weights={'a': 1} must be a list"),
    ("train data.weights=${logger}", "data.weights: invalid value assigned: dict is not a ListConfig, list or tuple"),
    ("train trainer.devices=${logger}", "trainer.devices: value '{'kind': 'wandb', "),
    # keys
    (
        "train ~trainer.max_steps",
        "~trainer.max_steps: what is in the configuration cannot be taken away; trainer.max_steps=VALUE sets",
    ),
    ("train ~logger", "~logger: what is in the configuration cannot be taken away; logger=OPTION takes another (csv, none, "),
    ("train ~trainer.max_step", "trainer.max_step is not a key; did you mean trainer.max_steps?"),
    ("train trainer.fast_dev_run=true", "trainer.fast_dev_run is not a key; --help lists them"),
    ("train model.foo=1", "model.foo is not a key; --help lists them"),
    ("train modle.n_layer=1", "modle.n_layer is not a key; did you mean model.n_layer?"),
    ("train warmup=1", "warmup is not a key; did you mean optimizer.warmup_steps?"),
    ("train +seed=3", "Could not append to config. An item is already at 'seed'"),
    ("train ++sead=3", "sead is not a key; did you mean seed?"),
    ("train hydra/launcher=7", "hydra/launcher=7 is not the name of an option; --hydra-help lists Hydra's own"),
    ("train hydra.verbose=${x}", "hydra.verbose: interpolation key 'x' not found"),
    ("train hydra.verbose=3", "hydra.verbose=3 must be true, false"),
    # folders
    ("train hydra.run.dir=", "hydra.run.dir is empty; name a folder, or leave it out"),
    ("train hydra.run.dir=${nothing}/a", "hydra.run.dir: interpolation key 'nothing' not found; \\${ is the text ${"),
    ("train -m seed=1,2 hydra.sweep.dir=", "hydra.sweep.dir is empty"),
    ("tune_tiles hydra.run.dir=x", "hydra.run.dir is for train.py: this command has no folder of its own"),
    ("train resume=", "resume is empty; name the folder that goes on, or leave it out"),
    ("train ++resume=run", "resume=run: there is no run here"),
    ("train -m resume=run", "resume=run goes on with one run, so leave -m out"),
    (f"train resume={'a' * 300}", "there is no run here"),
    (f"train hydra.run.dir={'a' * 300}", "file name too long; name another path"),
    # flags
    ("train --config-name=foo", "--config-name=foo is not a choice (train)"),
    ("train --config-dir=/no/such", "--config-dir=/no/such is no folder; name one that holds YAML files"),
    ("train --config-path=/no/such", "--config-path=/no/such is no folder"),
    ("train --resolve", "--resolve goes with --cfg or --help, as in --cfg=job --resolve"),
    ("train --cfg=foo", "--cfg=foo is not a choice (job, hydra, all)"),
    ("train --help trainer.max_step=3", "trainer.max_step is not a key; did you mean trainer.max_steps?"),
    ("train --cfg job trainer.max_step=3", "trainer.max_step is not a key; did you mean trainer.max_steps?"),
    ("train --hydra-help sed=3", "sed is not a key; did you mean seed?"),
    ("train --info defaults attention=egaer", "did you mean eager?"),
    ("train -m", "-m runs a sweep, and no key here has several values; KEY=A,B has (leave -m out to run once)"),
    ("train -m hydra.sweep.dir=s", "-m runs a sweep, and no key here has several values"),
    ("train --foo", "--foo is not a flag; values have no dashes: foo=VALUE; --help lists them"),
    ("generate --model=m", "--model is not a flag; values have no dashes: model=m"),
]


@pytest.mark.parametrize(("typed", "message"), REFUSED)
def test_a_bad_input_is_one_line_and_leaves_nothing(call, tmp_path, typed, message):
    code, said, given = call(*typed.split(" "))
    assert (code, given) == (2, [])
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert not any(tmp_path.iterdir())


TAKEN = [
    ("train", "optimizer.lr=1e-300"),
    ("train", "trainer.max_steps=9223372036854775807"),
    ("train", "prompt="),
    ("train", "~callbacks.early_stopping", "callbacks=early_stopping"),
    ("train", "slurm=submit", "model.d_model=65536", "model.n_layer=100", "trainer.devices=8"),  # another machine's memory
    ("train", "--run", "seed=3"),
    ("generate", "model=m", "temperature=1e-300"),
]


@pytest.mark.parametrize("arguments", TAKEN)
def test_an_odd_input_that_can_work_is_taken(call, arguments):
    code, said, given = call(*arguments)
    assert (code, said, len(given)) == (0, "", 1)


@pytest.mark.parametrize("arguments", [("--help", "data=text"), ("--cfg", "job", "data=text"), ("-h", "seed=1,2", "sweep=s", "-m")])
def test_what_only_shows_may_lack_values(call, arguments):
    assert call("train", *arguments) == (0, "", [])


def test_its_own_configuration_files(call, tmp_path):
    """Groups, options and a main file in another folder are checked as ours are."""
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "wide.yaml").write_text("d_model: 256\n")
    (tmp_path / "mine" / "long.yaml").write_text("defaults:\n  - train\n  - _self_\ntrainer:\n  max_steps: 7\n")
    code, said, [(cfg, _)] = call("train", "--config-dir", "mine", "-cn", "long", "model=wide")
    assert (code, said, cfg.model.d_model, cfg.trainer.max_steps) == (0, "", 256, 7)
    assert "did you mean wide?" in call("train", "--config-dir=mine", "model=wid")[1]
    assert "did you mean long?" in call("train", "--config-dir=mine", "--config-name=lon")[1]


def test_the_version_is_ours(call):
    assert call("train", "--version")[0] == 0


def test_another_data_set_has_no_default_configuration(call):
    """data.hub_config=sample-10BT is of the default data set alone."""
    for arguments, expected in (
        ([], ("HuggingFaceFW/fineweb-edu", "sample-10BT")),
        (["data.hub_name=OWNER/NAME"], ("OWNER/NAME", None)),
        (["data.hub_name=OWNER/NAME", "data.hub_config=en"], ("OWNER/NAME", "en")),
        (["data.hub_config=null"], ("HuggingFaceFW/fineweb-edu", None)),
    ):
        _, said, [(cfg, _)] = call("train", "data=hub", *arguments)
        assert (said, cfg.data.hub_name, cfg.data.hub_config) == ("", *expected)


# ---- every key ----


def numbers(kind, prefix=""):
    """Every key of a schema that holds a number, or a list of them."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from numbers(hint, f"{prefix}{field.name}.")
        elif "int" in str(hint) or "float" in str(hint):
            yield f"{prefix}{field.name}", "list" in str(hint), "int" in str(hint)


EVERY = [(command, *key) for command, schema in SCHEMAS.items() for key in numbers(schema)]


@pytest.mark.parametrize(("command", "key", "is_list", "is_whole"), EVERY)
def test_no_number_is_beyond_the_finite(command, key, is_list, is_whole):
    values = [float("inf"), float("-inf"), float("nan"), *([2**63, -(10**22)] if is_whole else [])]
    for value in values:
        with pytest.raises(UserError, match=rf"{key}(\[0\])?(=|:).*(finite|64 bits|could not be converted|incompatible)"):
            parse(OmegaConf.create(nested(key, [value] if is_list else value)), SCHEMAS[command])


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def test_every_schema_has_numbers():
    assert len(EVERY) > 60 and {command for command, *_ in EVERY} == {*SCHEMAS} - {"report"}


# ---- lines to be pasted ----


@pytest.mark.parametrize("name", [name for name in NASTY if name != "null"])
@pytest.mark.parametrize(("key", "command"), [("resume", "train"), ("run", "export"), ("model", "evaluate"), ("sweep", "train")])
def test_a_printed_line_means_its_folder(name, key, command):
    """What a shell makes of KEY=PATH, as this command line reads it."""
    from flash_ladder.overrides import for_hydra, parse_override

    [pasted] = shlex.split(argument(key, f"r/{name}"))
    value = parse_override(for_hydra(pasted, text_keys(SCHEMAS[command]))).value()
    assert OmegaConf.to_container(OmegaConf.create({key: value}), resolve=True)[key] == f"r/{name}"


def test_scripts_take_any_path(call):
    for command, key, others in (("export", "run", []), ("evaluate", "text", ["model=m"]), ("benchmark_attention", "out", [])):
        for name in ("lr=0.1,b=(2) it's", "${x}"):
            code, said, given = call(command, f"{key}={name}", *others)
            assert (code, said, getattr(given[0][0], key)) == (0, "", name)


# ---- what is near ----


def test_only_a_near_name_is_meant():
    assert nearest("atention", ["attention", "seed"]) == "; did you mean attention?"
    assert nearest("gpt2", ["llama_1b", "gpt2_124m"]) == "; did you mean gpt2_124m?"
    for word in ("fast_dev_run", "fp8", "lr", "x", "zzz"):
        assert nearest(word, ["val_every", "warmup_steps", "num_workers", "precision", "trainer", "n_layer"]) == ""


def test_a_number_may_be_as_low_as_asked():
    at_least(0, a=0, b=None, c=5)
    with pytest.raises(UserError, match=r"a\.b=-1 must be at least 0"):
        at_least(0, a__b=-1)


# ---- memory ----


def test_what_does_not_fit_is_said_with_both_figures(monkeypatch):
    must_fit("x", 2**30, "less", there=2**30)
    with pytest.raises(UserError, match="x would take 2 GiB, and this machine has 1 GiB; less"):
        must_fit("x", 2**31, "less", there=2**30)
    assert 2**28 < machine_memory() < 2**50


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(("norm", "position", "mlp"), [("rmsnorm", "rotary", "swiglu"), ("layernorm", "learned", "gelu")])
def test_the_counted_parameters_are_the_models(bias, tie, norm, position, mlp):
    from flash_ladder.model.gpt import GPT

    cfg = ModelConfig(norm=norm, position=position, mlp=mlp, bias=bias, tie_embeddings=tie, qk_norm=tie, vocab_size=300)
    assert GPT(cfg).n_params == cfg.n_params(300)


def test_a_cpu_must_hold_training(monkeypatch):
    cfg = Config(model=ModelConfig(vocab_size=2048))
    cfg.check_cpu_memory()
    monkeypatch.setattr("flash_ladder.memory.machine_memory", lambda: 10 * 2**20)  # the weights take 4 MiB
    with pytest.raises(UserError, match=r"training a model of 1,049,728 parameters .* would take 16 MiB"):
        cfg.check_cpu_memory()
    monkeypatch.setattr("flash_ladder.memory.machine_memory", lambda: 2**30)
    monkeypatch.setattr("flash_ladder.schema.free_memory", lambda: 2**20)
    with pytest.raises(UserError, match=r"the logits of 1,024 positions and 2,048 tokens would take 8 MiB, .* trainer.loss_rows=N"):
        cfg.check_cpu_memory()


# ---- files ----


def test_lines_of_json_that_are_hard_to_read(tmp_path):
    """Only the text counts: numbers of any length may stand beside it. Too deep a nesting is said with its line."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a", "n": ' + "9" * 5000 + "}\n")
    assert read_files([file], "text", tmp_path / "1")["text"] == ["a"]
    file.write_text('{"text": 12}\n')
    with pytest.raises(UserError, match="line 1: text is int, not text"):
        read_files([file], "text", tmp_path / "2")
    file.write_text('{"text": "a"}\n{"text": "b", "x": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    with pytest.raises(UserError, match=r"a.jsonl, line 2 has too many brackets in brackets to be read; leave the field"):
        read_files([file], "text", tmp_path / "3")


def test_paths_of_any_length_and_kind(tmp_path):
    for name in [n for n in NASTY if "/" not in n] + ["long" * 50]:
        (tmp_path / f"{name}.txt").write_text("a")
        assert user_files([f"{tmp_path}/{name}.txt"]) == [tmp_path / f"{name}.txt"]
    for pattern in ("a" * 300 + ".txt", "b/" * 3000 + "c.txt"):
        with pytest.raises(UserError, match="no such file"):
            user_files([f"{tmp_path}/{pattern}"])
    with pytest.raises(UserError, match=r"no such file; several files are a list, data.files=\[a.txt,b.txt\]"):
        user_files(["zzzzzzzzz.txt,yyyyyyyyyy.txt"])


def test_a_target_that_cannot_be_is_refused_first(tmp_path):
    with pytest.raises(UserError, match="out=/ cannot be replaced; name a folder below it"), replace_folder(Path("/"), []):
        pass
    for path, message in ((tmp_path, "is a folder; name a file"), (tmp_path / "no" / "a.json", "there is no folder")):
        with pytest.raises(UserError, match=message):
            check_file(path, "out")
    check_file(tmp_path / "a.json", "out")
    write_json(tmp_path / "a.json", {})
    check_file(tmp_path / "a.json", "out")


def test_a_step_has_no_more_batches_than_the_text_has_windows():
    from types import SimpleNamespace

    from flash_ladder.training.run import check_step

    def data(n_train_tokens):
        return SimpleNamespace(stats=SimpleNamespace(n_train_tokens=n_train_tokens))

    cfg = Config()
    cfg.trainer.accumulate = 1_000_000
    with pytest.raises(UserError, match=r"trainer.accumulate=1000000: .*; 100 \(of data.seq_len=128\) is the most"):
        check_step(cfg, data(100 * 128))
    check_step(cfg, data(None))  # a stream
    cfg.trainer.accumulate = 100
    check_step(cfg, data(100 * 128))
