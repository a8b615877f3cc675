"""The doctor: what it says of this machine, of GPUs that are not here, and of PyTorch's own choice."""

import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from flash_ladder.errors import UserError
from flash_ladder.kernels import BACKENDS, choose, jit
from flash_ladder.machine import doctor
from flash_ladder.machine import hardware as machine
from flash_ladder.machine.sdpa_choice import AttentionCall, SdpaChoice
from flash_ladder.script_schema import DoctorConfig
from tests.recipe.test_scripts import call

CPU = torch.device("cpu")


def asked(features=("is_causal",), **change):
    shape = {"device": CPU, "dtype": torch.float32, "batch_size": 2, "n_head": 4, "n_kv_head": 2, "seq_len": 64, "head_dim": 16}
    return AttentionCall(**shape | change, features=frozenset(features))


@pytest.fixture
def gpu(monkeypatch):
    """Puts GPUs into the machine: pretend((name, capability), ...)."""

    def pretend(*found, hip=None, memory_gib=140):
        class Properties:
            multi_processor_count, total_memory, shared_memory_per_block_optin = 132, memory_gib * 2**30, 227 * 1024
            gcnArchName = "gfx942"

            def __init__(self, name, capability):
                self.name, (self.major, self.minor) = name, capability

        def properties(device):
            return Properties(*found[device.index or 0])

        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[device.index or 0][1])
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * 2**30, 140 * 2**30))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
        monkeypatch.setattr(jit, "INTERPRET", False)
        monkeypatch.setattr(machine, "nvidia_driver", lambda: "580.65")
        monkeypatch.setattr(machine, "compiler_trouble", lambda: None)
        monkeypatch.setattr(
            doctor, "ask_sdpa", lambda call: SdpaChoice(["cudnn", "flash"], {"efficient": "is switched off in PyTorch"})
        )

    return pretend


# ---- this machine ----


def test_the_command(tmp_path):
    done = call("doctor.py", "document_ids=true", "n_kv_head=4", "device=cpu", "out=report.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and {p.name for p in tmp_path.iterdir()} == {"report.json"}
    for title in ("this machine\n", "the call\n", "the rungs", "optional packages\n", "\nnext\n  python train.py"):
        assert title in done.stdout
    assert "12 heads sharing 4 of keys and values, 1,024 positions, head_dim 64" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= doctor.WIDTH
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["call"]["features"] == ["document_ids", "is_causal"] and written["call"]["dtype"] == "float32"
    assert "\n  flash is  PyTorch's own kernel for CPUs" in done.stdout and written["sdpa_flash"].startswith("PyTorch's own")
    assert written["sdpa"]["order"][0] == "flash" and {rung["name"] for rung in written["rungs"]} == {*BACKENDS}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("seq_length=3", "did you mean seq_len?"),
        ("dtype=bf16", "dtype=bf16 is not a choice"),
        ("n_kv_head=5", "n_kv_head can be 1, 2, 3, 4, 6, 12"),
        ("softcap=0", "softcap=0.0 must be positive"),
        ("head_dim=0", "head_dim=0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, argument, message):
    done = call("doctor.py", argument, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


def test_help(tmp_path):
    done = call("doctor.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "python scripts/doctor.py" in done.stdout and "window_size: null" in done.stdout


def test_a_gpu_that_is_not_here():
    with pytest.raises(UserError, match="device=cuda"):
        doctor.diagnose(DoctorConfig(device="cuda"))


def test_auto_is_what_choose_says():
    found = doctor.diagnose(DoctorConfig(device="cpu", softcap=3.0, dtype="bfloat16"))
    assert found.auto == str(choose(CPU, torch.bfloat16, 64, features=frozenset({"is_causal", "softcap"})))
    refusals = {rung.name: rung.refusal for rung in found.rungs}
    assert refusals["eager"] is None and "softcap" in refusals["sdpa"]
    assert found.sdpa_note == "asked without softcap, which PyTorch's operation does not have here"


def test_what_a_rung_refuses(monkeypatch):
    def why_not(backend, device, dtype, head_dim, features):
        takes_it = dtype == torch.float16 and (16 <= head_dim <= 64 or head_dim == 128) and not features & {"softcap"}
        return None if takes_it else "no"

    monkeypatch.setattr(doctor, "why_not", why_not)
    assert doctor.ask_rung("flash_v9", asked()) == doctor.Rung("flash_v9", "no", {"float16": "16 to 64, 128"}, ["softcap"])
    monkeypatch.setattr(doctor, "why_not", lambda *call: "needs a GPU")
    assert doctor.ask_rung("flash_v9", asked()) == doctor.Rung("flash_v9", "needs a GPU", {}, [])


# ---- GPUs that are not here ----


@pytest.mark.parametrize(
    ("name", "capability", "words"),
    [
        ("NVIDIA H200", (9, 0), ["compute capability 9.0; Hopper", "227 KiB", "100.0 GiB free", "peak 989 TFLOP/s in bfloat16"]),
        ("Tesla T4", (7, 5), ["Turing", "float16 (Turing has fp16 tensor cores", "peak 65 TFLOP/s in float16"]),
        (
            "Tesla P100-PCIE",
            (6, 0),
            ["older than Turing", "peak in float32 is not in the table", "no code for GPU 0 (compute capability 6.0)"],
        ),
        ("NVIDIA R100", (13, 0), ["newer than the table", "ask for one by name", "no code for GPU 0"]),
        ("NVIDIA Thor", (11, 0), ["not in the table"]),
    ],
)
def test_a_gpu(gpu, name, capability, words):
    gpu((name, capability))
    found = doctor.diagnose(DoctorConfig())
    text = " ".join(doctor.report(found).split())
    for word in [name, *words, "driver 580.65", "runs cudnn behind it flash", "next python train.py"]:
        assert word in text
    assert found.auto == str(choose(torch.device("cuda"), found.call.dtype, 64))
    assert ("has no bf16" in " ".join(doctor.diagnose(DoctorConfig(dtype="bfloat16")).warnings)) == (capability < (8, 0))
    assert max(map(len, doctor.report(found).splitlines())) <= doctor.WIDTH


@pytest.mark.parametrize(
    ("memory_gib", "capability", "command"),
    [
        (140, (9, 0), "python train.py experiment=gpt2_124m"),
        (24, (8, 9), "python train.py experiment=gpt2_124m data.batch_size=32 trainer.accumulate=16"),
        (16, (7, 5), "python train.py experiment=gpt2_124m data.batch_size=16 trainer.accumulate=32"),
        (16, (6, 0), "python train.py"),
    ],
)
def test_what_to_type_fits_the_gpu(gpu, memory_gib, capability, command):
    gpu(("Some GPU", capability), memory_gib=memory_gib)
    assert doctor.diagnose(DoctorConfig()).next[0] == command


def test_what_the_rungs_lack_on_hopper(gpu):
    """flash_v3 lacks no feature there, asked for deterministic gradients or not; PyTorch's operation lacks those by argument."""
    gpu(("NVIDIA H200", (9, 0)))
    found = doctor.diagnose(DoctorConfig())
    rungs = {rung.name: rung for rung in found.rungs}
    spans = {"float16": "16 to 256", "bfloat16": "16 to 256"}
    assert rungs["flash_v3"] == doctor.Rung("flash_v3", None, spans, [])
    assert found.auto.startswith("flash_v3 (") and rungs["flash_v2"].refusal is None
    text = " ".join(doctor.report(found).split())
    assert "flash_v3 runs the call takes float16, bfloat16 with head_dim 16 to 256" in text
    assert "runs cudnn behind it flash" in text and "flash is FlashAttention-2 (built in)" in text
    assert "this call runs cudnn instead" in text
    found = doctor.diagnose(DoctorConfig(deterministic=True))
    rungs = {rung.name: rung for rung in found.rungs}
    assert found.auto.startswith("flash_v3 (") and "no deterministic" in rungs["sdpa"].refusal


def test_flash_v3_on_a_cpu_takes_nothing():
    text = " ".join(doctor.report(doctor.diagnose(DoctorConfig(device="cpu"))).split())
    assert "flash_v3 does not run the call: flash_v3 is written in Gluon, which has no interpreter" in text
    assert "on the CPU flash_v1 and flash_v2 run in Triton's interpreter" in text


def test_several_gpus(gpu):
    gpu(("NVIDIA H200", (9, 0)), ("NVIDIA L4", (8, 9)))
    text = doctor.report(doctor.diagnose(DoctorConfig(device="cuda:1")))
    assert "GPU 0" in text and "GPU 1" in text and "trainer=ddp trainer.devices=2" in text and "the GPUs differ" in text
    assert "NVIDIA L4, Ada" in text  # the call is for the second one
    assert "trainer.accelerator=cpu" in doctor.report(doctor.diagnose(DoctorConfig(device="cpu")))


def test_an_amd_gpu(gpu):
    gpu(("AMD Instinct MI300X", (9, 4)), hip="6.4")
    found = doctor.diagnose(DoctorConfig())
    text = " ".join(doctor.report(found).split())
    assert "gfx942; not NVIDIA's" in text and "built for ROCm 6.4" in text
    assert found.auto.startswith("sdpa") and "flash is AMD's kernel" in text


def test_a_gpu_that_cannot_be_asked(gpu, monkeypatch):
    def fails(*question):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    gpu(("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(doctor, "ask_sdpa", fails)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    text = " ".join(doctor.report(doctor.diagnose(DoctorConfig())).split())
    assert "could not be asked: CUDA out of memory." in text and "how much is free cannot be read" in text and "Tried" not in text


def test_what_stands_in_a_kernels_way(gpu, monkeypatch):
    gpu(("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(machine, "compiler_trouble", lambda: "Triton needs a C compiler")
    assert "Triton needs a C compiler" in doctor.diagnose(DoctorConfig()).warnings
    monkeypatch.setattr(jit, "INTERPRET", True)
    assert any("TRITON_INTERPRET=1 is set" in warning for warning in doctor.diagnose(DoctorConfig()).warnings)


# ---- packages ----


def test_packages(monkeypatch):
    installed = {"torch": "2.13.0+cu128", "lightning": "2.6.3", "numpy": "1.24.0"}

    monkeypatch.setattr(machine, "installed", installed.get)
    asks = [
        "torch>=2.11,<2.16",
        'lightning>=2.6.4; extra == "train"',
        'numpy>=1.26; extra == "train"',
        'wandb>=0.27; extra == "train"',
        'ruff>=0.17; extra == "dev"',
        'triton; platform_system == "X"',
    ]
    monkeypatch.setattr(machine, "requires", lambda project: asks)
    found = machine.packages()
    assert [(p.name, p.fits) for p in found] == [("torch", True), ("lightning", False), ("numpy", False), ("wandb", False)]
    malicious, numpy, wandb = doctor.find_warnings(asked(), [], found)
    assert "lightning 2.6.3 was a malicious release" in malicious and "lightning>=2.6.4" in malicious
    assert "numpy is 1.24.0, and this project asks for >=1.26" in numpy and "wandb is not installed" in wandb

    def not_installed(project):
        raise PackageNotFoundError(project)

    monkeypatch.setattr(machine, "requires", not_installed)
    assert "versions are not checked" in next(doctor.find_warnings(asked(), [], machine.packages()))


def test_an_interpreter_that_cannot_run_is_a_warning(monkeypatch):
    monkeypatch.setattr(jit, "NUMPY_TROUBLE", jit.numpy_trouble("3.6.0", "2.4.1"))
    found = doctor.diagnose(DoctorConfig(device="cpu"))
    assert any("cannot run on this CPU: Triton 3.6's interpreter needs numpy below 2.4" in warning for warning in found.warnings)
    assert "far too slow" not in doctor.report(found)
