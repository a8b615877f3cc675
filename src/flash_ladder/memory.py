"""What fits into memory, from arithmetic: said before it is taken, since a machine that runs out of memory kills at random."""

from __future__ import annotations

import math
from pathlib import Path

from flash_ladder.errors import UserError
from flash_ladder.units import size

PROCESS = 200 * 2**20  # bytes that a process of a run takes at the least: Python, torch and Lightning
WORKER = 16 * 2**20  # and one that only loads or tokenises: what it does not share with its parent


def machine_memory() -> int:
    """Bytes of memory that this machine has, or the container that this process is in."""
    with open("/proc/meminfo") as lines:
        total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text().strip() if limit.is_file() else ""
    return min(total, int(said)) if said.isdigit() else total


def free_memory() -> int:
    """Bytes that this machine can still give to a process (MemAvailable of Linux)."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def must_fit(what: str, n_bytes: float, way_out: str, there: float | None = None, where: str = "this machine has") -> None:
    """Raises UserError where `n_bytes` for `what` are more than `there` is. None: than this machine has.

    The message is "`what` would take 5 TiB, and `where` 16 GiB; `way_out`".
    """
    there = machine_memory() if there is None else there
    if n_bytes > there:
        amount = size(n_bytes) if n_bytes < math.inf else "more"
        raise UserError(f"{what} would take {amount}, and {where} {size(there)}; {way_out}")
