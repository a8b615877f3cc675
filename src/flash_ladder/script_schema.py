"""What a user of scripts/ may choose: one dataclass per file of scripts/conf, with every default, as in flash_ladder.schema."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import product

from flash_ladder.errors import UserError, at_least, nearest, one_of
from flash_ladder.model_schema import check_groups
from flash_ladder.names import BACKENDS, CHOICES, MASKED_PEERS, PEERS
from flash_ladder.schema import PRECISIONS, WANDB_MODES


@dataclass
class ExportConfig:
    """scripts/conf/export.yaml: which checkpoint of which run, and how the exported model is checked."""

    run: str | None = None  # the folder that train.py wrote
    checkpoint: str = "best"  # best, last, or the path of a .ckpt file
    out: str | None = None  # None: RUN/export
    attention: str = "auto"  # auto: what the run was trained with; or a backend
    precision: str = "auto"  # PRECISIONS; auto: what the run was trained in
    windows: int | None = None  # validation windows; None: those of the training
    seq_len: int | None = (
        None  # tokens of a window, fewer than in training where eager attention does not fit; None: as in training
    )
    batch_size: int | None = None  # windows at once; None: up to 32, as many as keep the logits under 1 GiB
    device: str = "auto"  # auto | cpu | cuda | cuda:1
    wandb: str = "auto"  # the figures go into the run's wandb: auto (as the run did), offline, online; or disabled

    def validate(self) -> None:
        if not self.run:
            raise UserError("run=RUN is missing: name the folder that train.py wrote, such as run=outputs/DATE/TIME")
        if not self.checkpoint.endswith(".ckpt"):
            one_of("checkpoint", self.checkpoint, ("best", "last", "PATH.ckpt"))
        one_of("attention", self.attention, CHOICES)
        one_of("precision", self.precision, PRECISIONS)
        one_of("wandb", self.wandb, ("auto", *WANDB_MODES))
        at_least(1, windows=self.windows, seq_len=self.seq_len, batch_size=self.batch_size)


@dataclass
class EvaluateConfig:
    """scripts/conf/evaluate.yaml: an exported model on a backend of this machine."""

    model: str | None = None  # the folder that scripts/export.py wrote
    attention: str = "auto"  # auto: the best one for this machine; or a backend
    against: str | None = None  # a second backend: the logits are compared too
    precision: str = "auto"  # PRECISIONS; auto: what export evaluated in
    text: str | None = None  # a text file of your own instead of the validation windows
    windows: int | None = None  # how many windows, from the first on; None: all
    batch_size: int | None = None  # windows at once; None: up to 32, as many as keep the logits under 1 GiB
    device: str = "auto"  # auto | cpu | cuda | cuda:1
    out: str | None = None  # a JSON file for the result
    # The figures go into wandb's run of the training: auto (as the run did, where its folder holds the export), offline or online
    # (from anywhere); or disabled. Those of another text never do.
    wandb: str = "auto"

    def validate(self) -> None:
        if not self.model:
            raise UserError("model=EXPORTED is missing: name the folder that scripts/export.py wrote, such as model=RUN/export")
        one_of("wandb", self.wandb, ("auto", *WANDB_MODES))
        if self.text is not None and self.wandb in ("offline", "online"):
            raise UserError(f"wandb={self.wandb} logs figures of the validation windows; text={self.text} is another text")
        one_of("attention", self.attention, CHOICES)
        if self.against is not None:
            one_of("against", self.against, CHOICES)
        one_of("precision", self.precision, PRECISIONS)
        at_least(1, windows=self.windows, batch_size=self.batch_size)


@dataclass
class CertifyConfig:
    """scripts/conf/certify.yaml: a model of transformers, and two implementations of its attention."""

    model: str | None = None  # a folder that save_pretrained wrote, or OWNER/NAME on the Hugging Face hub
    a: str = "auto"  # auto and the rungs are ours; eager, sdpa and others transformers'
    b: str = "eager"
    text: str | None = None  # a text file; None: the source of Python's argparse, which is on every machine
    seq_len: int | None = None  # tokens of a window; None: 1024, or as many positions as the model has
    windows: int = 8  # at most, from the beginning of the text
    tokens: int = 1000  # of the two greedy continuations; 0: none
    dtype: str = "auto"  # float32 | bfloat16 | float16; auto: as the weights are stored
    device: str = "auto"  # auto | cpu | cuda | cuda:1
    out: str = "certificate"  # a folder for the certificate: JSON, Markdown, PNG, SVG

    def validate(self) -> None:
        if not self.model:
            raise UserError("model=FOLDER is missing: name a folder that save_pretrained wrote, or OWNER/NAME on the hub")
        if self.a == self.b:
            raise UserError(f"a={self.a} and b={self.b} are one and the same; name two")
        one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        at_least(1, seq_len=self.seq_len, windows=self.windows)
        at_least(0, tokens=self.tokens)


@dataclass
class GenerateConfig:
    """scripts/conf/generate.yaml: text from an exported model."""

    model: str | None = None  # the folder that scripts/export.py wrote
    prompt: str = "def "
    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int | None = 50  # draw among the k likeliest tokens; None: among all
    seed: int = 0
    attention: str = "auto"  # auto: the best one for this machine; or a backend
    device: str = "auto"  # auto | cpu | cuda | cuda:1

    def validate(self) -> None:
        if not self.model:
            raise UserError("model=EXPORTED is missing: name the folder that scripts/export.py wrote, such as model=RUN/export")
        one_of("attention", self.attention, CHOICES)
        at_least(1, max_new_tokens=self.max_new_tokens, top_k=self.top_k)
        at_least(0, temperature=self.temperature, seed=self.seed)


# What a benchmark measures. The other keys (baseline, out, plot) also serve to look at a finished run.
GRID = (
    "backends", "seq_len", "memory_seq_len", "head_dim", "causal", "n_kv_head", "tokens", "width", "dtype", "error_seq_len",
    "milliseconds", "masks", "mask_seq_len",
)  # fmt: skip
MASKS = ("window", "documents", "ragged")


def split_mask(name: str) -> tuple[str, int]:
    """The mask "window_1024" as ("window", 1024); raises UserError for a name that is none."""
    kind, _, length = name.rpartition("_")
    if kind not in MASKS or not re.fullmatch("-?[0-9]+", length):
        close = nearest(name, [f"{one}_{length if length.isdigit() else 'N'}" for one in MASKS])
        raise UserError(f"masks={name} is not a choice ({', '.join(f'{one}_N' for one in MASKS)}){close}")
    if int(length) < 1:
        raise UserError(f"masks={name}: its length must be at least 1")
    return kind, int(length)


@dataclass
class BenchmarkConfig:
    """scripts/conf/benchmark_attention.yaml: grid and backends; benchmark.grid decides by machine what None stands for."""

    backends: list[str] | None = None  # None: every rung, and the peers that are installed here
    baseline: str | None = None  # ratios of speed are over this one; None: fa2 on a GPU, eager without one
    seq_len: list[int] | None = None  # None: [1024, 4096, 16384] on a GPU, [64, 128, 256] without one
    # Further lengths, memory only; None: [8192, 65536] on a GPU, [512, 1024, 2048] without one.
    memory_seq_len: list[int] | None = None
    head_dim: list[int] | None = None  # None: [64, 128] on a GPU, [32] without one
    causal: list[bool] = field(default_factory=lambda: [True, False])
    n_kv_head: list[int | None] = field(default_factory=lambda: [None])  # None: as many as query heads; [None, 4] compares with 4
    tokens: int | None = None  # batch * seq_len; None: 16384 on a GPU, 256 without one
    width: int | None = None  # heads * head_dim; None: 2048 on a GPU, 64 without one
    dtype: str | None = None  # bfloat16 | float16 | float32; None: bfloat16 on a GPU, float32 without one
    # Errors are measured on one sequence of this length; None: 1024 on a GPU, 128 without one.
    error_seq_len: int | None = None
    milliseconds: int = 100  # spent on measuring each time
    # Causal masks, timed beside no mask on a GPU; []: none.
    masks: list[str] = field(default_factory=lambda: ["window_1024", "window_4096", "documents_2048", "ragged_2048"])
    mask_seq_len: int = 16384  # length of the one sequence that masks are timed on
    out: str | None = None  # a JSON file for the result, written after every shape
    plot: str | None = None  # NAME.png for the picture of speed; NAME_memory.png and NAME_error.png are written beside it
    read: str | None = None  # a JSON file of an earlier run, which is shown again; nothing is measured

    def validate(self) -> None:
        for backend in self.backends or ():
            one_of("backends", backend, (*BACKENDS, *PEERS))
        if self.baseline is not None and self.backends is not None and self.baseline not in self.backends:
            raise UserError(f"baseline={self.baseline} is not among backends ({', '.join(self.backends)})")
        if self.dtype is not None:
            one_of("dtype", self.dtype, ("bfloat16", "float16", "float32"))
        at_least(1, tokens=self.tokens, width=self.width, milliseconds=self.milliseconds)
        at_least(1, error_seq_len=self.error_seq_len, mask_seq_len=self.mask_seq_len)
        for mask in self.masks:
            split_mask(mask)
        if self.read is not None:
            asked = [name for name in GRID if getattr(self, name) != getattr(BenchmarkConfig(), name)]
            if asked:
                raise UserError(f"{asked[0]} says what to measure, and read={self.read} shows a run that is done; one of the two")
        for name in ("backends", "seq_len", "memory_seq_len", "head_dim", "causal", "n_kv_head", "masks"):
            values = getattr(self, name) or []
            if len(set(values)) < len(values):
                raise UserError(f"{name}={values} names one thing twice")
        for name in ("backends", "head_dim", "causal", "n_kv_head"):
            if getattr(self, name) == []:
                raise UserError(f"{name}=[] leaves nothing to measure; name one at least")
        if self.seq_len == [] and self.memory_seq_len == []:  # the masks alone
            if not self.masks:
                raise UserError("seq_len=[], memory_seq_len=[] and masks=[] leave nothing to measure; name one at least")
            if self.backends is not None and not {*self.backends} & {*BACKENDS, *MASKED_PEERS}:
                able = f"{', '.join((*BACKENDS, *MASKED_PEERS[:-1]))} or {MASKED_PEERS[-1]}"
                raise UserError(f"seq_len=[] and memory_seq_len=[] leave the masks alone, and no backend takes them; name {able}")
        for name in ("seq_len", "memory_seq_len", "head_dim", "n_kv_head"):
            for value in getattr(self, name) or ():
                at_least(1, **{name: value})
        if self.width is not None:
            for head_dim, n_kv_head in product(self.head_dim or (), self.n_kv_head):
                if self.width % head_dim or (n_kv_head and self.width // head_dim % n_kv_head):
                    groups = f", in whole groups for n_kv_head={n_kv_head}" if n_kv_head else ""
                    raise UserError(
                        f"head_dim={head_dim}: width={self.width} must be a whole number of heads{groups}; "
                        f"width={head_dim * (n_kv_head or 1) * max(1, self.width // (head_dim * (n_kv_head or 1)))} would work"
                    )
        if self.plot is not None and not self.plot.endswith(".png"):
            raise UserError(f"plot={self.plot} must end with .png")


@dataclass(kw_only=True)
class CompleteBenchmark(BenchmarkConfig):
    """BenchmarkConfig once benchmark.grid.complete has decided every None for the machine."""

    backends: list[str]
    baseline: str
    seq_len: list[int]
    memory_seq_len: list[int]
    head_dim: list[int]
    tokens: int
    width: int
    dtype: str
    error_seq_len: int


@dataclass
class DoctorConfig:
    """scripts/conf/doctor.yaml: the call of attention that doctor asks this machine about."""

    batch_size: int = 8
    n_head: int = 12
    n_kv_head: int | None = None  # None: as many as query heads
    seq_len: int = 1024
    head_dim: int = 64
    dtype: str = "auto"  # bfloat16 | float16 | float32 | float64; auto: what trainer.precision=auto takes here
    causal: bool = True
    window_size: int | None = None  # how many positions back a query sees; None: all
    softcap: float | None = None  # scores become c * tanh(score / c); None: they stay
    alibi: bool = False  # scores fall with distance
    document_ids: bool = False  # attention stays inside a document
    return_lse: bool = False  # also ask for the log-sum-exp of the scores
    deterministic: bool = False  # gradients with the same bits every time
    device: str = "auto"  # auto | cpu | cuda | cuda:1
    out: str | None = None  # a JSON file for the report

    @property
    def features(self) -> frozenset[str]:
        """The arguments of `kernels.attention` that the call uses."""
        used = {
            "is_causal": self.causal,
            "window_size": self.window_size is not None,
            "softcap": self.softcap is not None,
            "alibi_slopes": self.alibi,
            "document_ids": self.document_ids,
            "return_lse": self.return_lse,
            "deterministic": self.deterministic,
        }
        return frozenset(name for name, is_used in used.items() if is_used)

    def validate(self) -> None:
        at_least(1, batch_size=self.batch_size, n_head=self.n_head, n_kv_head=self.n_kv_head, seq_len=self.seq_len)
        at_least(1, head_dim=self.head_dim, window_size=self.window_size)
        one_of("dtype", self.dtype, ("auto", "bfloat16", "float16", "float32", "float64"))
        if self.softcap is not None and not self.softcap > 0:
            raise UserError(f"softcap={self.softcap} must be positive; null leaves the scores as they are")
        if self.n_kv_head:
            check_groups(self.n_head, self.n_kv_head)


@dataclass
class HubKernelConfig:
    """scripts/conf/hub_kernel.yaml: where the kernels go, for Hugging Face's package `kernels`."""

    out: str | None = None  # the folder to write
    version: int = 1  # of the kernel on the hub

    def validate(self) -> None:
        if not self.out:
            raise UserError("out=FOLDER is missing: name the folder to write, such as out=flash-ladder-kernel")
        at_least(1, version=self.version)


@dataclass
class ReportConfig:
    """scripts/conf/report.yaml: the runs to report on."""

    runs: str | None = None  # a folder that train.py wrote, or one above it
    out: str | None = None  # a folder for the report; None: the folder of the runs
    baseline: str | None = None  # the backend that speed-ups are over; None: eager, or sdpa where eager was not measured

    def validate(self) -> None:
        if not self.runs:
            raise UserError("runs=FOLDER is missing: name a folder that train.py wrote or one above it: runs=outputs/DATE/TIME")
        if self.baseline is not None:
            one_of("baseline", self.baseline, BACKENDS)


@dataclass
class TuneConfig:
    """scripts/conf/tune_tiles.yaml: which of flash_v2's kernels, and the shapes that candidates are timed on."""

    head_dim: list[int] = field(default_factory=lambda: [64, 128, 256])
    kernels: list[str] = field(default_factory=lambda: ["forward", "dq", "dkdv"])
    seq_len: list[int] = field(default_factory=lambda: [1024, 4096, 16384])
    causal: list[bool] = field(default_factory=lambda: [True, False])
    tokens: int = 16384  # batch * seq_len
    width: int = 2048  # heads * head_dim
    dtype: str = "bfloat16"  # bfloat16 | float16
    milliseconds: int = 20  # spent on measuring each figure
    processes: int | None = None  # that compile; None: one per core, 8 at most (each takes some of the GPU's memory)
    out: str | None = None  # a file for the rows of kernels/tiles.py

    def validate(self) -> None:
        for kernel in self.kernels:
            one_of("kernels", kernel, ("forward", "dq", "dkdv"))
        one_of("dtype", self.dtype, ("bfloat16", "float16"))
        at_least(1, tokens=self.tokens, width=self.width, milliseconds=self.milliseconds, processes=self.processes)
        for head_dim in self.head_dim:
            if not 16 <= head_dim <= 256 or self.width % head_dim:
                raise UserError(f"head_dim={head_dim} must be 16 to 256, and width={self.width} a whole number of heads")
        for seq_len in self.seq_len:
            at_least(1, seq_len=seq_len)
        for name in ("head_dim", "kernels", "seq_len", "causal"):
            if not getattr(self, name):
                raise UserError(f"{name}=[] leaves nothing to time")
