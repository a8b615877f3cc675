"""Where a command runs: which device, in which precision, with which attention, each with its reason.

`decide` answers for a training run, from its whole configuration. `pick_device` and `pick_backend` answer for a command that names
a device and a backend. A UserError refuses whatever cannot run here; nothing is silently replaced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flash_ladder.errors import UserError
from flash_ladder.kernels import Choice, Unsupported, choose
from flash_ladder.kernels.generations import dtype_name
from flash_ladder.model_schema import ModelConfig
from flash_ladder.processes import Processes, started
from flash_ladder.schema import Config, TrainerConfig, too_few_gpus

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32": torch.float32}  # what attention computes in, by precision
PRECISIONS = {dtype_name(dtype): precision for precision, dtype in DTYPES.items()}  # precision by dtype: "bfloat16" is "bf16-mixed"


@dataclass(frozen=True)
class Place:
    """Where a run happens and in which arithmetic, each with its reason."""

    device: torch.device  # of this process
    n_devices: int  # of all nodes together
    precision: str
    precision_reason: str
    attention: Choice
    n_nodes: int = 1
    processes: Processes | None = None  # that something started together with this one
    context_parallel: int = 1  # devices that share a sequence

    @property
    def data_parallel(self) -> int:
        """How many batches the devices work on at a time: one each, or one for every group that shares its sequences."""
        return self.n_devices // self.context_parallel

    @property
    def dtype(self) -> torch.dtype:
        """What attention computes in."""
        return DTYPES[self.precision]


def decide(cfg: Config) -> Place:
    """Device, precision and attention of a training run; raises UserError where what was asked for cannot run here."""
    processes = started()
    device, per_node, n_nodes = pick_devices(cfg.trainer, processes)
    precision, reason = pick_precision(cfg.trainer.precision, device)
    if precision == "16-mixed" and cfg.trainer.strategy == "fsdp":
        raise UserError("trainer.precision=16-mixed has no trainer=fsdp (the loss scale needs whole gradients); trainer=ddp has it")
    if cfg.trainer.master_weights and precision != "bf16-mixed":
        raise UserError(f"trainer.master_weights=true is for bf16, not for trainer.precision={precision}; bf16-mixed would work")
    if cfg.trainer.master_weights and (per_node * n_nodes > 1 or cfg.trainer.strategy != "auto"):
        raise UserError("trainer.master_weights=true runs on one device; without it trainer=ddp and trainer=fsdp take several")
    deterministic = (
        cfg.trainer.deterministic and cfg.attention.backend != "sdpa"
    )  # sdpa follows PyTorch's switch, which Lightning sets
    choice = pick_backend(cfg.attention.backend, cfg.model, device, precision, cfg.data.document_ids, deterministic)
    if choice.backend == "eager" and cfg.trainer.activation_checkpointing == "keep_attention":
        raise UserError(
            "trainer.activation_checkpointing=keep_attention has nothing to keep with attention=eager, whose backward needs all "
            "its scores; true works, and the other backends take either"
        )
    return Place(device, per_node * n_nodes, precision, reason, choice, n_nodes, processes, cfg.trainer.context_parallel)


def pick_devices(cfg: TrainerConfig, processes: Processes | None = None) -> tuple[torch.device, int, int]:
    """This process's device, how many of its kind take part on each node, and the number of nodes.

    processes: those that torchrun or srun started; they decide, and a configuration that says otherwise is refused.
    """
    has_gpu = torch.cuda.is_available()
    if cfg.accelerator == "gpu" and not has_gpu:
        raise UserError("trainer.accelerator=gpu: PyTorch finds no GPU here; trainer.accelerator=auto runs on the CPU")
    on_gpu = has_gpu and cfg.accelerator != "cpu"
    there = torch.cuda.device_count() if on_gpu else 1
    asked = None if cfg.devices in ("auto", "-1", -1) else cfg.devices
    if processes is None:
        if cfg.num_nodes is not None and cfg.num_nodes > 1:
            raise UserError(
                f"trainer.num_nodes={cfg.num_nodes}: one process cannot start those of other nodes; torchrun, srun and "
                f"slurm=submit do (docs/devices.md)"
            )
        per_node = there if cfg.devices is not None and asked is None else int(asked or cfg.context_parallel)
    else:
        per_node = processes.per_node
        for key, value, is_so in (("devices", asked, per_node), ("num_nodes", cfg.num_nodes, processes.n_nodes)):
            if value not in (None, is_so):
                raise UserError(
                    f"trainer.{key}={value}, but {processes.by} started {processes.n} processes, {per_node} on each of "
                    f"{processes.n_nodes} nodes; leave trainer.{key} out, or start as many"
                )
    if on_gpu and per_node > there:
        plural = "s" * (there > 1)
        if processes is None:
            raise too_few_gpus(cfg, per_node, there)
        raise UserError(
            f"{processes.by} started {per_node} processes on this node, and PyTorch finds {there} GPU{plural}: start one a GPU, "
            f"and let every process see all of them (srun: --gpus-per-node, not --gpus-per-task)"
        )
    n_nodes = 1 if processes is None else processes.n_nodes
    check_context_parallel(cfg.context_parallel, per_node * n_nodes)
    local_rank = 0 if processes is None else processes.local_rank
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return device, per_node, n_nodes


def check_context_parallel(context_parallel: int, n_devices: int) -> None:
    """Raises UserError where the devices are no equal groups of `context_parallel` that share a sequence."""
    if n_devices % context_parallel:
        more = -(-n_devices // context_parallel) * context_parallel
        raise UserError(
            f"trainer.context_parallel={context_parallel}: {n_devices} device{'s' * (n_devices > 1)} cannot be cut into groups of "
            f"{context_parallel} that share a sequence; {more} could"
        )


def pick_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """The precision and why: bf16 from Ampere on, fp16 on Turing, which has no bf16, and float32 elsewhere."""
    check_precision(asked, device, "trainer.precision")
    if asked != "auto":
        return asked, "asked for"
    if device.type == "cpu":
        return "32", "a CPU"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return "bf16-mixed", "the GPU has bf16 tensor cores"
    if capability == (7, 5):
        return "16-mixed", "Turing has fp16 tensor cores and no bf16"
    return "32", "a GPU before Turing"


def check_precision(precision: str, device: torch.device, key: str) -> None:
    """Raises UserError, which names the `key`, for a precision that this device has not."""
    if precision == "16-mixed" and device.type == "cpu":
        raise UserError(f"{key}=16-mixed needs a GPU; on a CPU 32 and bf16-mixed work")


def pick_device(name: str) -> torch.device:
    """The device named ("cpu", "cuda", "cuda:1"), or for "auto" a GPU if there is one. Raises UserError where it is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name} is not a device this runs on; auto, cpu, cuda and cuda:1 are")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}: PyTorch finds {torch.cuda.device_count()} GPUs here; device=cpu works anywhere")
    return device


def pick_backend(
    name: str, model: ModelConfig, device: torch.device, precision: str, documents: bool = False, deterministic: bool = False
) -> Choice:
    """The attention backend named, or for "auto" the best one here, and why. Raises UserError where it cannot run here.

    documents, deterministic: whether the call keeps packed documents apart, and whether its gradients must repeat bit by bit.
    """
    used = {"is_causal": True, "document_ids": documents, "deterministic": deterministic}
    features = frozenset(name for name, is_used in used.items() if is_used) | model.attention_features()
    try:
        return choose(device, DTYPES[precision], model.head_dim, backend=name, features=features)
    except Unsupported as error:
        raise UserError(str(error)) from None
