"""What a user may choose: one dataclass per group of conf/, with the defaults, the types and the checks.

Only this file, and model_schema.py for conf/model, hold the defaults: conf/ is composed on top of them, and an option file holds
only what differs. `validate` refuses a combination in one line: what is wrong, why, and what would work. Nothing heavy is imported
here. flash_ladder.front_door reads YAML and the command line into these classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from flash_ladder.errors import UserError, at_least, one_of
from flash_ladder.memory import PROCESS, WORKER, free_memory, must_fit
from flash_ladder.model_schema import ModelConfig, divisors
from flash_ladder.names import CHOICES

PRECISIONS = ("auto", "bf16-mixed", "16-mixed", "32")
LOGGERS = ("wandb", "csv", "tensorboard", "none")
WANDB_MODES = ("offline", "online", "disabled")

# Arguments of Lightning's Trainer that the recipe sets, and the key that a user sets them by.
OWN_KEYS = {
    "accelerator": "trainer.accelerator",
    "devices": "trainer.devices",
    "num_nodes": "trainer.num_nodes",
    "strategy": "trainer.strategy",
    "precision": "trainer.precision",
    "max_steps": "trainer.max_steps",
    "accumulate_grad_batches": "trainer.accumulate",
    "val_check_interval": "trainer.val_every",
    "check_val_every_n_epoch": "trainer.val_every",
    "limit_val_batches": "trainer.val_batches",
    "log_every_n_steps": "trainer.log_every",
    "deterministic": "trainer.deterministic",
    "gradient_clip_val": "optimizer.grad_clip",
    "gradient_clip_algorithm": "optimizer.grad_clip",
    "logger": "logger",
    "callbacks": "callbacks",
    "default_root_dir": "hydra.run.dir",
    "plugins": "the recipe",
    "use_distributed_sampler": "the recipe",
    "enable_checkpointing": "trainer.checkpoints",
}

# Keys that other recipes have, and why this one has not.
NOT_HERE = {
    "model.dropout": "there is none, as the flash rungs keep no random mask; optimizer.weight_decay holds a model back",
}

# ---- one dataclass per group of conf/ ----


@dataclass
class AttentionConfig:
    """conf/attention: which kernel runs. `auto` asks kernels.generations and prints the reason."""

    backend: str = "auto"  # auto, or one of names.BACKENDS

    def validate(self) -> None:
        one_of("attention.backend", self.backend, CHOICES)


@dataclass
class DataConfig:
    """conf/data: which text, how it becomes tokens, and how many tokens a step sees."""

    source: str = "stdlib"  # stdlib: Python's own library; files: the user's; hub: a data set by name
    # files: a path, a glob or a list of them: txt, json, jsonl (also .gz and .zst), parquet, a folder of save_to_disk, or tokens as
    # .bin and .npy.
    files: Any = None
    weights: list[float] | None = None  # files: how often a document comes from each entry of the list; None: all there are
    val_files: Any = None  # as files: the text to validate on, in place of a share of the other
    hub_name: str | None = None
    hub_config: str | None = None
    hub_split: str = "train"
    streaming: bool = False  # hub: read while training, instead of downloading and tokenising first
    text_column: str = "text"  # jsonl, parquet and hub: the field that holds a document
    tokenizer: str = "bpe"  # bpe: trained on the corpus; bytes: every byte is a token; or the path of a tokenizer.json
    vocab_size: int = 2048  # bpe: number of tokens, 256 bytes and <|endoftext|> among them
    seq_len: int = 128
    batch_size: int = 8  # sequences a device sees at once
    # Tokens of one optimiser step on all devices together; batch_size then follows from it, whatever it is set to (`batching`).
    tokens_per_step: int | None = None
    val_fraction: float = 0.05  # share of the text held out (streaming holds out the beginning instead)
    # Draws the documents that are held out and those that the tokenizer is trained on, the same ones whatever `seed` is.
    # None: `seed` draws them, and val_fraction is a share of their number.
    split_seed: int | None = 0
    document_ids: bool = False  # keep attention inside a document
    num_proc: int = 2  # processes that tokenise
    num_workers: int = 0  # processes that load batches, per device; of a stream at most one
    cache_dir: str | None = None  # None: ~/.cache/flash_ladder

    def paths(self) -> list[str]:
        """`files` as a list of strings."""
        return as_list(self.files)

    def validate(self) -> None:
        one_of("data.source", self.source, ("stdlib", "files", "hub"))
        if not ("/" in self.tokenizer or self.tokenizer.endswith(".json")):
            one_of("data.tokenizer", self.tokenizer, ("bpe", "bytes", "PATH/tokenizer.json"))
        at_least(1, data__seq_len=self.seq_len, data__batch_size=self.batch_size, data__num_proc=self.num_proc)
        at_least(1, data__tokens_per_step=self.tokens_per_step)
        at_least(0, data__num_workers=self.num_workers, data__split_seed=self.split_seed)
        for key, files in (("data.files", self.files), ("data.val_files", self.val_files)):
            listed = files if isinstance(files, list) else [files]
            if files is not None and not all(isinstance(file, str) for file in listed):
                raise UserError(f"{key}={files} must be a path, a glob or a list of them")
        if self.source == "files" and not self.paths():
            raise UserError("data=text needs data.files=PATH (txt, jsonl or parquet; a glob or a [list, of, paths] works too)")
        if self.weights is not None and len(self.weights) != len(self.paths()):
            raise UserError(f"data.weights has {len(self.weights)} numbers for {len(self.paths())} entries of data.files; one each")
        if self.weights is not None and not all(0 < weight < math.inf for weight in self.weights):
            raise UserError(f"data.weights={self.weights} must be numbers above 0")
        if self.val_files is not None and self.streaming:
            raise UserError("data.val_files is not for data.streaming=true, which holds out the beginning of the stream")
        if self.source != "files" and self.paths():
            raise UserError(f"data.files={self.files} is for data=text; data.source={self.source} does not read it")
        if self.source == "hub" and not self.hub_name:
            raise UserError("data=hub needs data.hub_name=OWNER/NAME")
        if self.streaming and self.source != "hub":
            raise UserError("data.streaming=true is for data=hub; local files are memory-mapped already")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"data.val_fraction={self.val_fraction} must lie between 0 and 1")
        if self.tokenizer == "bpe" and self.vocab_size < 257:
            raise UserError(f"data.vocab_size={self.vocab_size}: a byte-level BPE has 256 bytes and <|endoftext|>, so at least 257")


def as_list(files: Any) -> list[str]:
    """data.files or data.val_files as a list of strings."""
    if files is None:
        return []
    return [files] if isinstance(files, str) else [str(file) for file in files]


@dataclass
class OptimizerConfig:
    """conf/optimizer: what turns gradients into weights, and the learning rate over the steps."""

    name: str = "adamw"  # adamw | muon (for the blocks' matrices, AdamW for the rest)
    lr: float = 3e-3
    schedule: str = "cosine"  # after the warm-up: cosine | linear | wsd (holds, then falls in a line) | constant
    min_lr_ratio: float = 0.1  # the schedule ends at lr * min_lr_ratio
    decay_ratio: float = 0.2  # wsd: the share of the steps in which it falls
    warmup_steps: int = 50
    weight_decay: float = 0.1  # matrices only; norms and biases are not decayed
    beta1: float = 0.9
    beta2: float = 0.99  # 0.95 suits batches of many thousand tokens better
    momentum: float = 0.95  # muon's
    grad_clip: float = 1.0  # largest global gradient norm; 0 turns clipping off

    def validate(self) -> None:
        at_least(0, optimizer__lr=self.lr, optimizer__warmup_steps=self.warmup_steps, optimizer__weight_decay=self.weight_decay)
        at_least(0, optimizer__grad_clip=self.grad_clip)
        one_of("optimizer.name", self.name, ("adamw", "muon"))
        one_of("optimizer.schedule", self.schedule, ("cosine", "linear", "wsd", "constant"))
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2), ("momentum", self.momentum)):
            if not 0 <= value < 1:
                raise UserError(f"optimizer.{name}={value} must lie in [0, 1)")
        for name, value in (("min_lr_ratio", self.min_lr_ratio), ("decay_ratio", self.decay_ratio)):
            if not 0 <= value <= 1:
                raise UserError(f"optimizer.{name}={value} must lie in [0, 1]")


@dataclass
class TrainerConfig:
    """conf/trainer: how long, on what, in which precision."""

    max_steps: int = 800
    accelerator: str = "auto"  # auto | cpu | gpu
    # On each node; -1 or auto: all. None: as many as torchrun or srun started processes, else context_parallel.
    devices: int | str | None = None
    num_nodes: int | None = None  # None: as many as torchrun or srun started processes on, else 1
    strategy: str = "auto"  # auto (ddp on several devices) | ddp | fsdp
    shard: str = "weights"  # what fsdp keeps in pieces between the batches of a step: weights (all) | optimizer (its state)
    context_parallel: int = 1  # devices that hold a sequence together, each a part of its positions (docs/long_context.md)
    timeout_seconds: float = 600  # how long a process may leave the others waiting before the run ends and names it
    precision: str = "auto"  # PRECISIONS; auto: bf16-mixed from Ampere on, 16-mixed on Turing, 32 on a CPU
    master_weights: bool = False  # weights, residual stream and gradients in bf16, beside float32 masters; one device
    accumulate: int = 1  # batches per optimiser step
    compile: bool = False  # torch.compile the network
    val_every: int = 200  # steps between validations
    val_batches: int = 40  # batches of every validation, the last one included
    log_every: int = 10
    # true: a block keeps only its input for the backward pass, and runs once more in it; keep_attention: all of it but attention.
    activation_checkpointing: bool | str = False
    loss_rows: int | None = None  # positions whose logits exist at once; None: all of a batch
    deterministic: bool = False
    checkpoints: bool = True  # false: none are kept, for runs that only measure; such a run cannot go on
    profile: bool = False  # a trace and a table of kernels of a few steps, in the run's folder
    lightning: dict[str, Any] = field(default_factory=dict)  # further arguments of its Trainer: +trainer.lightning.KEY=VALUE

    def validate(self) -> None:
        one_of("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        one_of("trainer.strategy", self.strategy, ("auto", "ddp", "fsdp"))
        one_of("trainer.shard", self.shard, ("weights", "optimizer"))
        one_of("trainer.precision", self.precision, PRECISIONS)
        at_least(1, trainer__max_steps=self.max_steps, trainer__accumulate=self.accumulate, trainer__val_every=self.val_every)
        at_least(1, trainer__val_batches=self.val_batches, trainer__log_every=self.log_every, trainer__loss_rows=self.loss_rows)
        at_least(1, trainer__num_nodes=self.num_nodes, trainer__timeout_seconds=self.timeout_seconds)
        at_least(1, trainer__context_parallel=self.context_parallel)
        if not isinstance(self.activation_checkpointing, bool):
            choices = ("false", "true", "keep_attention")
            one_of("trainer.activation_checkpointing", self.activation_checkpointing, choices)
        if isinstance(self.devices, str) and self.devices not in ("auto", "-1") and not self.devices.isdigit():
            raise UserError(
                f"trainer.devices={self.devices} must be a number, or auto; CUDA_VISIBLE_DEVICES picks which GPUs are seen"
            )
        if isinstance(self.devices, int) and self.devices < 1 and self.devices != -1:
            raise UserError(f"trainer.devices={self.devices} must be a number of devices, or -1 or auto for all of them")
        for name in self.lightning:
            if name in OWN_KEYS:
                raise UserError(f"trainer.lightning.{name}: {OWN_KEYS[name]} sets that here")


def too_few_gpus(trainer: TrainerConfig, n: int, there: int) -> UserError:
    """What to say where a run takes `n` GPUs of this machine, which has `there`."""
    found = f"PyTorch finds {there} GPU{'s' * (there > 1)} here"
    if trainer.devices is None:
        return UserError(f"trainer.context_parallel={n}: {found}, and a sequence lies over one for each of its parts")
    return UserError(f"trainer.devices={n}: {found}; auto takes all there are")


@dataclass
class LoggerConfig:
    """conf/logger: what stands beside the metrics.jsonl that every run writes.

    The keys after `kind` are wandb's. None leaves the choice to wandb's own environment variable (WANDB_PROJECT, WANDB_MODE, ...)
    or settings file; where those are silent too, the mode is offline (online under `wandb agent`) and the project flash-ladder.
    """

    kind: str = "wandb"  # LOGGERS
    mode: str | None = None  # offline | online | disabled; WANDB_MODE
    project: str | None = None  # WANDB_PROJECT
    entity: str | None = None  # whose project: a user or a team; WANDB_ENTITY
    name: str | None = None  # of this run; WANDB_NAME
    group: str | None = None  # runs that belong together, as a sweep's do; WANDB_RUN_GROUP
    job_type: str | None = None  # WANDB_JOB_TYPE
    tags: list[str] | None = None  # WANDB_TAGS=a,b
    notes: str | None = None  # WANDB_NOTES

    def validate(self) -> None:
        one_of("logger.kind", self.kind, LOGGERS)
        if self.mode is not None:
            one_of("logger.mode", self.mode, WANDB_MODES)
        if self.kind == "tensorboard" and not any(find_spec(package) for package in ("tensorboard", "tensorboardX")):
            raise UserError("logger=tensorboard needs a package that is not installed: pip install tensorboard")


@dataclass
class SlurmConfig:
    """conf/slurm: train.py as a job of a SLURM cluster. Nodes and GPUs are trainer.num_nodes and trainer.devices."""

    submit: bool = False  # write RUN/job.sbatch and submit it, instead of training here
    partition: str | None = None
    account: str | None = None
    time: str = "1-00:00:00"  # days-hours:minutes:seconds; the job is stopped, queued again and goes on
    cpus: int = 8  # per GPU
    mem: str | None = None  # of a node, such as 200G
    constraint: str | None = None  # such as h100
    extra: list[str] = field(default_factory=list)  # further lines for #SBATCH, such as --qos=high
    setup: list[str] = field(default_factory=list)  # shell lines before the run, such as `module load cuda`
    signal_seconds: int = 120  # how long before the time is up the run is told to write a checkpoint

    def validate(self) -> None:
        at_least(1, slurm__cpus=self.cpus, slurm__signal_seconds=self.signal_seconds)


@dataclass
class Config:
    """conf/train.yaml: one run."""

    attention: AttentionConfig = field(default_factory=AttentionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)  # further callbacks of Lightning, by name: {"_target_": class, ...}
    seed: int = 1337
    resume: str | None = None  # a run's folder: goes on from its last checkpoint, with its configuration
    prompt: str = "def "  # the beginning of the sample that a run ends with

    def validate(self) -> None:
        for group in (self.attention, self.model, self.data, self.optimizer, self.trainer, self.logger, self.slurm):
            group.validate()
        if self.model.position == "learned" and self.data.seq_len > self.model.max_seq_len:
            raise UserError(
                f"data.seq_len={self.data.seq_len} is longer than the learned position table, model.max_seq_len="
                f"{self.model.max_seq_len}; raise max_seq_len or take model.position=rotary"
            )
        self.check_parts()
        at_least(0, seed=self.seed)
        # The devices are counted when the run starts; what does not come out on the fewest does not on more.
        with_batch_size(self, n_devices=self.trainer.context_parallel)
        if not self.slurm.submit:  # another machine's memory
            self.check_memory()

    def check_parts(self) -> None:
        """Raises UserError where a sequence and attention's heads cannot be cut into trainer.context_parallel equal parts."""
        parts, seq_len, n_head = self.trainer.context_parallel, self.data.seq_len, self.model.n_head
        if n_head % parts:
            raise UserError(
                f"trainer.context_parallel={parts} does not divide model.n_head={n_head}: in attention each device has an equal "
                f"share of the heads; it can be {', '.join(map(str, divisors(n_head)))}"
            )
        if seq_len % parts:
            raise UserError(
                f"data.seq_len={seq_len} is not a multiple of trainer.context_parallel={parts}: each device has an equal part of "
                f"the positions; data.seq_len={max(1, round(seq_len / parts)) * parts} would work"
            )

    def check_memory(self) -> None:
        """Raises UserError where this machine cannot hold what every run takes of it, whatever its devices have."""
        self.model.check_memory()  # built here, and moved to a device
        cfg = with_batch_size(self, n_devices=self.trainer.context_parallel)
        batch_size, seq_len = cfg.data.batch_size, cfg.data.seq_len
        less = "a smaller one, with a larger trainer.accumulate, takes less"
        must_fit(f"data.batch_size={batch_size}: a batch of tokens at data.seq_len={seq_len}", 8 * batch_size * (seq_len + 1), less)
        for key, n, each in (
            ("trainer.devices", self.trainer.devices, PROCESS),
            ("data.num_workers", self.data.num_workers, WORKER),
            ("data.num_proc", self.data.num_proc, WORKER),
        ):
            if isinstance(n, int):
                must_fit(f"{key}={n}: that many processes", n * each, "fewer would fit")

    def check_cpu_memory(self) -> None:
        """Raises UserError where training on the CPU takes more memory than is free, from a lower bound: weights, gradients and
        AdamW's two moments in float32, and the logits. A machine without memory kills processes instead.

        model.vocab_size must be filled in.
        """
        self.model.check_memory(16)
        vocab_size = self.model.vocab_size or 0
        positions = self.data.batch_size * self.data.seq_len
        rows = min(positions, self.trainer.loss_rows or positions)
        must_fit(
            f"the logits of {rows:,} positions and {vocab_size:,} tokens",
            4 * rows * vocab_size,
            "trainer.loss_rows=N takes N positions at a time, and a smaller data.batch_size takes fewer",
            free_memory(),
            "this machine's free memory is",
        )


# ---- from a file ----

T = TypeVar("T", ModelConfig, DataConfig)


def from_plain(kind: type[T], values: Any) -> T:
    """A group of the configuration from the plain values in a file, which may be anybody's; checked as a user's choice is.

    Raises UserError for what is no such group: another key, a value of another type or not finite, an impossible combination.
    """
    if not isinstance(values, dict):
        raise UserError("it is no group of KEY: VALUE")
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{name} is not a key")
        kinds = {get_origin(part) or part for part in get_args(hints[name]) or (hints[name],)}
        fits = Any in kinds or type(value) in kinds or (float in kinds and type(value) is int)
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{name} is {repr(value)[:60]}")
    group = kind(**values)
    group.validate()
    return group


# ---- tokens a step ----


def with_batch_size(cfg: Config, n_devices: int) -> Config:
    """`cfg` with the batch_size and accumulate that data.tokens_per_step asks for; `cfg` itself where it asks for nothing.

    n_devices: of the whole run. Raises UserError where the step cannot be cut evenly.
    """
    if cfg.data.tokens_per_step is None:
        return cfg
    batch_size, accumulate = batching(
        cfg.data.tokens_per_step, cfg.data.seq_len, cfg.trainer.accumulate, n_devices, cfg.trainer.context_parallel
    )
    return replace(cfg, data=replace(cfg.data, batch_size=batch_size), trainer=replace(cfg.trainer, accumulate=accumulate))


def batching(tokens_per_step: int, seq_len: int, accumulate: int, n_devices: int, context_parallel: int = 1) -> tuple[int, int]:
    """The batch_size of a device and the batches of a step that make up `tokens_per_step` tokens on all devices together.

    A step has `accumulate` batches, or as many as a device has sequences where those are fewer. context_parallel: devices that
    share their sequences, a divisor of n_devices.
    Raises UserError, with the nearest number that would work, where it does not come out even.
    """
    unit = seq_len * (n_devices // context_parallel)  # a sequence on every device, or group of devices
    sequences = tokens_per_step // unit  # of a device
    accumulate = min(accumulate, max(1, sequences))
    if sequences and sequences * unit == tokens_per_step and sequences % accumulate == 0:
        return sequences // accumulate, accumulate
    nearest = max(1, round(tokens_per_step / unit / accumulate)) * accumulate * unit
    devices = f" on {n_devices} devices" if n_devices > 1 else ""
    devices += f", {context_parallel} to a sequence" if context_parallel > 1 else ""
    batches = f" in {accumulate} batches a step" if accumulate > 1 else ""
    raise UserError(
        f"data.tokens_per_step={tokens_per_step} is not a whole number of sequences of data.seq_len={seq_len}{devices}{batches}; "
        f"data.tokens_per_step={nearest} would work"
    )
