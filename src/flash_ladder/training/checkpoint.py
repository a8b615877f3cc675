"""A run's checkpoints: written whole or not at all, read only as plain data.

Lightning's own writer goes through the system's temporary folder and never syncs: a kill at the wrong moment can leave a torn file
over a good one. Here the bytes reach the disk beside their target before they take its name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from flash_ladder.errors import UserError, argument, first_line, one_of
from flash_ladder.files import plain_yaml, sync
from flash_ladder.model_schema import ModelConfig
from flash_ladder.schema import DataConfig, from_plain
from flash_ladder.training import archive, metrics
from flash_ladder.training.log import say
from flash_ladder.training.record import read_metrics

SAVING = ".saving"  # suffix of a checkpoint that is being written, or that a killed process left


class Unusable(UserError):
    """A checkpoint that is not there, empty, cut short, changed, or none; another one of the same run may be whole."""


class AtomicCheckpointIO(CheckpointIO):
    """Saves through a hidden file in the target's folder, synced before it is renamed; loads with weights_only=True."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes `path`. Until that is done, a file already there stays as it is. Raises UserError where it cannot be written."""
        path = Path(path)
        saving = path.with_name(f".{path.name}{SAVING}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left_over in path.parent.glob(f".*.ckpt{SAVING}"):
                left_over.unlink()
            try:
                archive.save(checkpoint, saving)
                sync(saving)
                os.replace(saving, path)
                sync(path.parent)
            finally:
                saving.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:  # torch.save's RuntimeError hides what the disk said
            said = error if isinstance(error, OSError) else error.__context__
            reason = getattr(said, "strerror", None) or first_line(error)
            raise UserError(f"{path} cannot be written ({reason}); a checkpoint that was there before is untouched") from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads `path` as plain data, whatever `weights_only` says. Raises UserError for a file that is missing or damaged."""
        return rehomed(read_checkpoint(path, map_location or "cpu"), Path(path).parent)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes `path` if it is there."""
        Path(path).unlink(missing_ok=True)


def rehomed(checkpoint: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`checkpoint` with its notes on other files (the best one, and its score) pointing into `folder`, in which it lies now.

    A run that was moved or copied would otherwise forget its best score, and replace best.ckpt by a worse one. Where the best file
    did not come along, the score is of no use and is left to be forgotten.
    """
    home = os.path.realpath(folder)
    for state in checkpoint.get("callbacks", {}).values():
        if not isinstance(state, dict) or state.get("dirpath") in (None, home):
            continue
        moved = {path: os.path.join(home, os.path.basename(path)) for path in state.get("best_k_models", {})}
        if all(os.path.isfile(path) for path in moved.values()):
            state["dirpath"] = home
            state["best_k_models"] = {moved[path]: score for path, score in state["best_k_models"].items()}
            for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state[name] = state[name] and os.path.join(home, os.path.basename(state[name]))
    return checkpoint


def read_checkpoint(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint as plain data; with `mmap` its tensors stay on the disk until they are used.

    Raises UserError where it is missing, and Unusable where it is empty, cut short, changed or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    if path.stat().st_size == 0:
        raise Unusable(f"{path} is empty; take another checkpoint")
    try:
        fault = archive.fault(path)
        checkpoint = None if fault else torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except Exception as error:  # a file that is none, or made up, may raise anything in zipfile and in torch's reader
        raise Unusable(f"{path} cannot be read: it was cut short, or is not a checkpoint; take another one") from error
    if fault:
        raise Unusable(f"{path} is damaged: {fault}; take another one")
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise Unusable(f"{path} is not a checkpoint: it holds no dictionary, or an empty one; take another one")
    return checkpoint


def load_to_go_on(run: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """`load_run` of last.ckpt, or where that one is missing or damaged, and says so, of best.ckpt.

    A run that is killed at its first checkpoint may have best.ckpt alone, which is written first. Raises UserError as `load_run`.
    """
    try:
        return load_run(run, "last")
    except Unusable as damage:
        try:
            found = load_run(run, "best")
        except UserError:
            raise damage from None
        say(f"{str(damage).rpartition(';')[0]}; best.ckpt, of step {found[2]['step']}, takes its place")
        return found


def load_run(run: Path, which: str = "best") -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint of a run.

    run: the folder that train.py wrote. which: "best", "last" or the path of a .ckpt file.

    Returns the run's configuration as plain dicts (schema.Config), the weights under GPT's own names, and facts about the
    training: {"checkpoint": path, "step": optimiser steps taken, "val_loss": nats per token, as validated at that step, or None,
    "text": what TextData.state_dict gave, or None}.
    Raises UserError for a folder that is no run, and for a checkpoint that is missing, damaged or from another model.
    """
    path = find_checkpoint(run, which)
    checkpoint = read_checkpoint(path, mmap=True)  # mmap skips the optimiser's state, twice the size of the weights
    try:
        config = checkpoint["hyper_parameters"]["config"]
        weights = {name.removeprefix("net."): w for name, w in checkpoint["state_dict"].items() if name.startswith("net.")}
        step = checkpoint["global_step"]
        config["data"].setdefault("split_seed", None)  # earlier code drew the split by `seed`
        from_plain(DataConfig, config["data"])
        from_plain(ModelConfig, config["model"])
    except (KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{path} was not written by this version of train.py ({error}); take another checkpoint") from None
    _check_same_model(path, config["model"], run / "config.yaml")
    val_loss = recorded(run / "metrics.jsonl", metrics.VAL_LOSS, step)
    return config, weights, {"checkpoint": str(path), "step": step, "val_loss": val_loss, "text": checkpoint.get("TextData")}


def find_checkpoint(run: Path, which: str) -> Path:
    """The file of a run's checkpoint; raises UserError, naming what is there, where it does not exist."""
    if which.endswith(".ckpt"):
        return Path(which)
    one_of("checkpoint", which, ("best", "last"))
    folder = run / "checkpoints"
    if not folder.is_dir():
        runs = sorted([*run.glob("*/checkpoints"), *run.glob("*/*/checkpoints")])
        hint = "name a folder that train.py wrote, such as outputs/DATE/TIME"
        if runs:
            hint = f"did you mean {argument('run', runs[-1].parent)}?"
        raise UserError(f"run={run} {'is not a run (it has no checkpoints folder)' if run.is_dir() else 'does not exist'}; {hint}")
    path = folder / f"{which}.ckpt"
    if not path.is_file():
        others = sorted(p.stem for p in folder.glob("*.ckpt"))
        hint = f"checkpoint={others[0]} is there" if others else "training stopped before it wrote one"
        raise Unusable(f"run={run} has no checkpoint {path.name}; {hint}")
    return path


def _check_same_model(path: Path, model: dict[str, Any], config: Path) -> None:
    """Raises UserError where the checkpoint's model is not the one of the run's config.yaml."""
    if not config.is_file():
        raise UserError(f"{config} is missing: {config.parent} is not a folder that train.py wrote")
    try:
        saved = plain_yaml(config)["model"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config} is not what train.py wrote ({first_line(error)}); copy it again from its run") from None
    for name, value in saved:
        if value is not None and model.get(name) != value:  # None: filled in when the run started
            raise UserError(f"{path} is from another model: its {name} is {model.get(name)}, and {value} in {config}")


def recorded(file: Path, name: str, step: int) -> float | None:
    """The last value of `name` at optimiser step `step` in a run's metrics.jsonl; None where there is none."""
    value = None
    for row in read_metrics(file):
        if row.get("step") == step:
            value = row.get(name, value)
    return value
