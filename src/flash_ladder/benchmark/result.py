"""The attention benchmark's result: its cells, where they were measured, and what follows from them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import geometric_mean

from flash_ladder.errors import UserError
from flash_ladder.files import write_json
from flash_ladder.machine.decide import PRECISIONS
from flash_ladder.measure.flops import peak_tflops
from flash_ladder.units import GIB

GRADIENTS = ("dq", "dk", "dv")


@dataclass(frozen=True)
class Panel:
    """What the figures of a table's column or a picture's panel have in common."""

    causal: bool
    head_dim: int
    n_kv_head: int | None  # None: as many as query heads

    def __str__(self) -> str:
        heads = "" if self.n_kv_head is None else f" KV={self.n_kv_head}"
        return f"{'causal' if self.causal else 'full'} D={self.head_dim}{heads}"

    @property
    def title(self) -> str:
        """In words, over a picture."""
        heads = "" if self.n_kv_head is None else f", {self.n_kv_head} KV head{'s' if self.n_kv_head > 1 else ''}"
        return f"{'causal' if self.causal else 'full'}, head_dim {self.head_dim}{heads}"


@dataclass
class Cell:
    """One backend at one shape. A figure that was not measured is None, and `note` says why."""

    backend: str
    head_dim: int
    seq_len: int
    causal: bool
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    peak_gib: float | None = None  # forward and backward, above the inputs, of the whole batch
    note: str = ""
    n_kv_head: int | None = None

    @property
    def panel(self) -> Panel:
        return Panel(self.causal, self.head_dim, self.n_kv_head)


@dataclass
class Error:
    """One backend's error against float64: its rms over the rms of the exact values. None: not measured, `note` says why."""

    backend: str
    head_dim: int
    causal: bool
    n_kv_head: int | None = None
    output: float | None = None
    dq: float | None = None
    dk: float | None = None
    dv: float | None = None
    note: str = ""

    @property
    def panel(self) -> Panel:
        return Panel(self.causal, self.head_dim, self.n_kv_head)


@dataclass
class Masked:
    """One backend under one causal mask and without it: median milliseconds. None: not measured, `note` says why."""

    mask: str  # as in BenchmarkConfig.masks
    backend: str
    head_dim: int
    seq_len: int
    area: float  # visible pairs of query and key under the mask, over those under causality alone
    forward_ms: float | None = None
    backward_ms: float | None = None
    dense_forward_ms: float | None = None
    dense_backward_ms: float | None = None
    note: str = ""

    @property
    def forward(self) -> float | None:
        """The forward's time over the area's share of the dense time: 1 where time follows the area."""
        return over_share(self.forward_ms, self.area, self.dense_forward_ms)

    @property
    def backward(self) -> float | None:
        """The backward's time over the area's share of the dense time."""
        return over_share(self.backward_ms, self.area, self.dense_backward_ms)


def over_share(milliseconds: float | None, area: float, dense: float | None) -> float | None:
    """Time over `area` times the dense time; None where one of them is missing."""
    return None if milliseconds is None or dense is None else milliseconds / (area * dense)


@dataclass
class Result:
    """The figures of a grid, and where they were measured. `config` is BenchmarkConfig as a dict, every value decided."""

    device: str
    torch: str
    config: dict
    cells: list[Cell] = field(default_factory=list)
    errors: list[Error] = field(default_factory=list)
    masks: list[Masked] = field(default_factory=list)
    host_us: dict[str, float | None] = field(default_factory=dict)  # host time of one tiny forward call, by backend
    packages: dict[str, str] = field(default_factory=dict)  # package of each peer that has one, "fa3-fwd 0.0.3", by backend
    left_out: dict[str, str] = field(default_factory=dict)  # backends that the default list left out, and why
    device_gib: float | None = None
    triton: str | None = None
    cudnn: str | None = None
    driver: str | None = None
    date: str | None = None
    finished: bool = True

    @property
    def on_gpu(self) -> bool:
        return self.device != "CPU"

    @property
    def peak(self) -> float | None:
        """The GPU's dense peak in TFLOP/s for this dtype; None for one that is not in the table."""
        return peak_tflops(self.device, PRECISIONS[self.config["dtype"]])

    @property
    def backends(self) -> list[str]:
        """The measured backends, in the order of their measurement."""
        return list(dict.fromkeys(cell.backend for cell in self.cells))

    @property
    def panels(self) -> list[Panel]:
        """The panels, in the order of their measurement."""
        return list(dict.fromkeys(cell.panel for cell in self.cells))

    def rows(self) -> list[list[Cell]]:
        """The cells of each shape, in the order of their measurement."""
        shapes: dict[tuple, list[Cell]] = {}
        for cell in self.cells:
            shapes.setdefault((cell.panel, cell.seq_len), []).append(cell)
        return list(shapes.values())

    def sequence_bytes(self, panel: Panel, backend: str) -> dict[int, float]:
        """Peak bytes that one sequence costs, by seq_len.

        The grid keeps batch x seq_len constant, so that a linear algorithm's total does not change with the length. So memory is
        compared per sequence of the batch.
        """
        return {
            c.seq_len: c.peak_gib * GIB / batch_size(self.config["tokens"], c.seq_len)
            for c in self.cells
            if (c.panel, c.backend) == (panel, backend) and c.peak_gib is not None
        }

    def out_of_memory_at(self, panel: Panel, backend: str) -> int | None:
        """The shortest seq_len at which the backend ran out of memory."""
        cells = [c for c in self.cells if (c.panel, c.backend) == (panel, backend)]
        return min((c.seq_len for c in cells if c.note.startswith("out of memory")), default=None)


def batch_size(tokens: int, seq_len: int) -> int:
    """Sequences that make up `tokens`, at least one."""
    return max(1, tokens // seq_len)


def mean_speedup(result: Result, backend: str, other: str, figure: str) -> float | None:
    """Geometric mean of `backend`'s speed over `other`'s, over the shapes where both have the figure ("forward_tflops", ...)."""
    ratios = []
    for row in result.rows():
        speed = {cell.backend: getattr(cell, figure) for cell in row}
        if speed.get(backend) and speed.get(other):
            ratios.append(speed[backend] / speed[other])
    return geometric_mean(ratios) if ratios else None


def save(result: Result, path: Path) -> None:
    """Writes `result` as JSON, all of it or nothing."""
    write_json(path, asdict(result))


def read(path: Path) -> Result:
    """Reads what an earlier run wrote with out=. Raises UserError where the file is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["cells"] = [Cell(**cell) for cell in found["cells"]]
        found["errors"] = [Error(**error) for error in found.get("errors", [])]
        found["masks"] = [Masked(**masked) for masked in found.get("masks", [])]
        if not {"dtype", "tokens", "width", "seq_len", "baseline"} <= found["config"].keys():
            raise KeyError("config")
        return Result(**found)
    except OSError as error:
        raise UserError(f"read={path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"read={path} is not a result of this command; out=PATH writes one") from None
