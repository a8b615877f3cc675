"""What a user adds to a run beyond the recipe: arguments of Lightning's Trainer, callbacks, a profile."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_args

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch import Callback
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from flash_ladder.errors import UserError, nearest, one_of
from flash_ladder.schema import Config
from flash_ladder.training.profiler import Profile

PROFILERS: dict[str, type[Profiler]] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def extra_arguments(further: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """`further` (trainer.lightning) as arguments for Lightning's Trainer. A profiler named in it writes into `run_dir`.

    Raises UserError for an argument that Lightning does not have.
    """
    known = inspect.signature(L.Trainer).parameters
    for name, value in further.items():
        if name not in known:
            raise UserError(f"trainer.lightning.{name}: Lightning's Trainer has no such argument{nearest(name, known)}")
        taken = get_args(known[name].annotation) or (known[name].annotation,)
        if {*taken} <= {bool, int, float, str, type(None)} and type(value) not in taken:
            kinds = " or ".join("null" if kind is type(None) else kind.__name__ for kind in taken)
            raise UserError(f"trainer.lightning.{name}={value} must be {kinds}")
    profiler = further.get("profiler")
    if profiler is None:
        return dict(further)
    one_of("trainer.lightning.profiler", profiler, PROFILERS)
    return further | {"profiler": PROFILERS[profiler](dirpath=run_dir, filename="profiler")}


def extra_callbacks(cfg: Config, run_dir: Path) -> list[Callback]:
    """The callbacks of cfg.callbacks, and the profiler's where it is asked for. Raises UserError for one that cannot be made."""
    made = [_made(name, about) for name, about in cfg.callbacks.items() if about is not None]
    return [*made, *([Profile(run_dir / "profile")] if cfg.trainer.profile else [])]


def _made(name: str, about: Any) -> Callback:
    if not isinstance(about, dict) or "_target_" not in about:
        raise UserError(f"callbacks.{name} names no class; +callbacks.{name}._target_=PACKAGE.CLASS does")
    try:
        callback = instantiate(about)
    except Exception as error:  # whatever somebody else's class raises is the user's to read
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"callbacks.{name}: {about['_target_']} cannot be made ({reason})") from None
    if not isinstance(callback, Callback):
        kind = f"{type(callback).__module__}.{type(callback).__qualname__}"
        raise UserError(f"callbacks.{name}: {kind} is not a lightning.pytorch.Callback, and nothing would call it")
    return callback
