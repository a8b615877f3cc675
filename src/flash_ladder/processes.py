"""The processes of one run, one a device: who started them, and which of them this one is.

torchrun starts them, or srun in a SLURM job, and says so in the environment. Where neither did, the first process starts the
others itself (training/ranks.py) and speaks to them as torchrun would. Nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flash_ladder.errors import UserError

PARENT = "FLASH_LADDER_PARENT"  # in the environment of the processes that the first one started: its process id
MARGIN_SECONDS = 30.0  # by which a collective's own time-out is later than trainer.timeout_seconds, when it is known who is missing
PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True)
class Processes:
    """This process among all those of its run, and where they meet."""

    by: str  # who started them: "torchrun", "srun" or "train.py"
    rank: int  # of this process, among all
    local_rank: int  # among those of its node
    per_node: int
    n_nodes: int
    address: str  # of the first process's node
    port: int

    @property
    def n(self) -> int:
        """How many there are."""
        return self.per_node * self.n_nodes

    @property
    def node(self) -> int:
        """The number of this process's node."""
        return self.rank // self.per_node

    def environment(self, local_rank: int) -> dict[str, str]:
        """What the first process tells another one of its node."""
        return {
            "RANK": str(local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.n),
            "LOCAL_WORLD_SIZE": str(self.per_node),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            PARENT: str(os.getpid()),
        }


def started(environ: Mapping[str, str] | None = None) -> Processes | None:
    """The processes that something started together with this one; None where it stands alone.

    Raises UserError where what the environment says cannot be a run of equally many processes on every node.
    """
    environ = os.environ if environ is None else environ
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= environ.keys():
        return _by_torchrun(environ)
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # a job's script and salloc's shell have SLURM_NTASKS, but one process
        return _by_srun(environ)
    if "RANK" in environ and int(environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"RANK={environ['RANK']} and WORLD_SIZE={environ['WORLD_SIZE']} are set but no LOCAL_RANK: start the processes with "
            f"torchrun or srun, or unset the two"
        )
    return None


def is_first(processes: Processes | None) -> bool:
    """Whether this process is the one that prints and writes."""
    return processes is None or processes.rank == 0


def _by_torchrun(environ: Mapping[str, str]) -> Processes:
    n = int(environ["WORLD_SIZE"])
    per_node = int(environ.get("LOCAL_WORLD_SIZE", n))
    return Processes(
        by="train.py" if PARENT in environ else "torchrun",
        rank=int(environ["RANK"]),
        local_rank=int(environ["LOCAL_RANK"]),
        per_node=per_node,
        n_nodes=_nodes(n, per_node),
        address=environ.get("MASTER_ADDR", "127.0.0.1"),
        port=int(environ.get("MASTER_PORT", "29500")),
    )


def _by_srun(environ: Mapping[str, str]) -> Processes:
    n, n_nodes = int(environ["SLURM_STEP_NUM_TASKS"]), int(environ.get("SLURM_STEP_NUM_NODES", "1"))
    per_node = max(1, n // n_nodes)
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    return Processes(
        by="srun",
        rank=int(environ["SLURM_PROCID"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        per_node=per_node,
        n_nodes=_nodes(n, per_node),
        address=environ.get("MASTER_ADDR") or first_host(nodes),
        # All processes know the job's number, and two jobs on one node have different ones.
        port=int(environ.get("MASTER_PORT") or 15000 + int(environ.get("SLURM_JOB_ID", "0")) % 10000),
    )


def _nodes(n: int, per_node: int) -> int:
    if n % per_node:
        raise UserError(f"{n} processes are not equally many on every node; start as many on each, one a GPU")
    return n // per_node


def first_host(nodes: str) -> str:
    """The first name of a list of nodes as SLURM writes it: `gpu[003-005,9],cpu1` is gpu003."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?", nodes)
    return nodes if match is None else match[1] + (match[2] or "")


def children(name: str | None = None, but: str | None = None) -> list[int]:
    """The process ids of this process's children that have not ended (Linux): those called `name`, or all `but` those called so.

    Linux keeps up to 15 characters of a name.
    """
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # one that has just ended
            before, _, after = stat.read_text().rpartition(")")
            state, parent = after.split()[:2]
            called = before.partition("(")[2]
            if int(parent) == os.getpid() and state not in "ZX" and name in (None, called) and called != but:
                found.append(int(stat.parent.name))
    return found


def end_with_parent(wanted: bool) -> None:
    """Lets this process be killed when the one that started it ends, or no longer so (Linux).

    For a process that the first one of a run started, until its watch (training.ranks) takes over and says what happened.
    """
    if PARENT not in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError):  # another system
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL if wanted else 0)
    if os.getppid() != int(os.environ[PARENT]):  # it ended before
        os._exit(1)
