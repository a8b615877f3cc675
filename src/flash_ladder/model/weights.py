"""Tensors in files and in models: read and written without pickle, and loaded only into a model that they fit."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from flash_ladder.errors import UserError


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: Path | str) -> None:
    """Copies `weights` into `model`; raises UserError, naming the first tensor that differs, where they belong to another model."""
    expected = model.state_dict()
    for name in [*expected, *weights]:
        there = tuple(weights[name].shape) if name in weights else "missing"
        here = tuple(expected[name].shape) if name in expected else "not there"
        if there != here:
            raise UserError(f"{source} holds another model: {name} is {there} in it, and {here} in this configuration's model")
    model.load_state_dict(weights)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file; raises UserError where that fails."""
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be written ({error})") from None
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library makes the file readable by its owner alone


def as_safetensors(tensors: dict[str, Tensor]) -> bytes:
    """What `save_tensors` writes."""
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; raises UserError where it cannot be read."""
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again, or export again") from None
