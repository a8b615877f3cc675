"""The exported model: a folder that can be loaded, evaluated and asked for text without anything else.

    model.safetensors       the weights, float32, tied ones once
    config.json             the model's shape, how and on what it was trained, versions, checksums of the other files
    tokenizer.json          as in the `tokenizers` library
    validation.safetensors  the validation windows that it was evaluated on
    parity.json             that evaluation, on the training's backend and on eager

Nothing is pickled, so a folder from a stranger can be opened.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flash_ladder.data.tokenizer import Tokenizer
from flash_ladder.errors import UserError, argument, check_values
from flash_ladder.export.losses import Windows
from flash_ladder.files import checksum, read_json, write_json
from flash_ladder.model.gpt import GPT
from flash_ladder.model.weights import load_tensors, load_weights, save_tensors
from flash_ladder.schema import ModelConfig

FORMAT = "flash-ladder"
FORMAT_VERSION = 1
CHECKED = ("model.safetensors", "tokenizer.json", "validation.safetensors")  # their checksums are in config.json
FILES = ("config.json", "parity.json", *CHECKED)


def write_export(folder: Path, model: GPT, tokenizer: Tokenizer, windows: Windows, about: dict[str, Any]) -> None:
    """Writes an exported model, except parity.json, into the existing `folder`.

    windows: "tokens" int64 [N, S + 1] and maybe "document_ids" int32 [N, S]. about: plain data that config.json adds to the
    model's shape.
    """
    weights = {name: w.detach().float().contiguous() for name, w in model.state_dict().items()}
    save_tensors(folder / "model.safetensors", weights)
    tokenizer.save(folder)
    save_tensors(folder / "validation.safetensors", {name: rows.to(torch.int32).contiguous() for name, rows in windows.items()})
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": asdict(model.cfg),
        **about,
        "sha256": {name: checksum(folder / name) for name in CHECKED},
    }
    write_json(folder / "config.json", config)


def load_export(folder: Path, backend: str = "eager", device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Reads an exported model: the GPT in eval mode on `device`, its tokenizer, and config.json.

    Raises UserError where a file is missing, damaged, of a later format, or does not fit the others.
    """
    config = read_config(folder)
    for name in ("model.safetensors", "tokenizer.json"):
        _check(folder, name, config)
    try:
        cfg = ModelConfig(**config["model"])
        check_values(cfg, "model.")
        cfg.validate()
        cfg.check_memory()
        model = GPT(cfg, backend=backend)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} describes no model of this version ({error}); export again") from None
    load_weights(model, load_tensors(folder / "model.safetensors"), folder / "model.safetensors")
    return model.to(device).eval(), Tokenizer.load(folder), config


def load_windows(folder: Path, config: dict[str, Any]) -> Windows:
    """The validation windows of an exported model: "tokens" int64 [N, S + 1] and maybe "document_ids" int32 [N, S]."""
    _check(folder, "validation.safetensors", config)
    windows = load_tensors(folder / "validation.safetensors")
    return {**windows, "tokens": windows["tokens"].long()}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an exported model; raises UserError where `folder` is no exported model, or has a later format."""
    if not folder.is_dir():
        raise UserError(f"model={folder} does not exist; name a folder that scripts/export.py wrote, such as RUN/export")
    if not (folder / "config.json").is_file():
        hint = "name a folder that scripts/export.py wrote"
        if (folder / "export" / "config.json").is_file():
            hint = f"did you mean {argument('model', folder / 'export')}?"
        elif (folder / "checkpoints").is_dir():
            hint = f"it is a run: python scripts/export.py {argument('run', folder)} exports it"
        raise UserError(f"model={folder} is not an exported model (it has no config.json); {hint}")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{folder / 'config.json'} was not written by scripts/export.py (its format is not {FORMAT})")
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / 'config.json'} has format version {config.get('format_version')}, and this version of Flash Ladder reads "
            f"{FORMAT_VERSION}; a newer one may read it"
        )
    missing = [key for key in ("model", "training", "data", "sha256") if not isinstance(config.get(key), dict)]
    if missing:
        raise UserError(f"{folder / 'config.json'} has no {missing[0]}; export again")
    return config


def _check(folder: Path, name: str, config: dict[str, Any]) -> None:
    """Raises UserError where a file of an exported model is missing or has changed since export."""
    if not (folder / name).is_file():
        raise UserError(f"{folder / name} is missing from the exported model; copy it again, or export again")
    if checksum(folder / name) != config["sha256"].get(name):
        raise UserError(f"{folder / name} is damaged: its checksum is not the one in config.json; copy it again, or export again")
