"""What several tests read and is slow to make, made once, whichever of pytest-xdist's processes needs it first."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from pytest import TempPathFactory


def made_once(factory: TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` of this session, which `make` has filled. Tests may read it, and leave it as it is."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # all processes'
    folder, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()  # there is none: a `make` that fails is not tried again
            make(folder)
            done.touch()
    return folder
