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
from flash_ladder.errors import UserError, argument
from flash_ladder.export.losses import Windows
from flash_ladder.files import DIGEST, checksum, is_sealed, read_json, write_json
from flash_ladder.model.gpt import GPT
from flash_ladder.model.weights import load_tensors, load_weights, save_tensors
from flash_ladder.model_schema import ModelConfig
from flash_ladder.names import WINDOWS
from flash_ladder.schema import from_plain

FORMAT = "flash-ladder"
FORMAT_VERSION = 1
CHECKED = ("model.safetensors", "tokenizer.json", WINDOWS)  # their checksums are in config.json
FILES = ("config.json", "parity.json", *CHECKED)


def write_export(folder: Path, model: GPT, tokenizer: Tokenizer, windows: Windows, about: dict[str, Any]) -> None:
    """Writes an exported model, except parity.json, into the existing `folder`.

    windows: "tokens" int64 [N, S + 1] and maybe "document_ids" int32 [N, S]. about: plain data that config.json adds to the
    model's shape.
    """
    weights = {name: w.detach().float().contiguous() for name, w in model.state_dict().items()}
    save_tensors(folder / "model.safetensors", weights)
    tokenizer.save(folder)
    save_tensors(folder / WINDOWS, {name: rows.to(torch.int32).contiguous() for name, rows in windows.items()})
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": asdict(model.cfg),
        **about,
        "sha256": {name: checksum(folder / name) for name in CHECKED},
    }
    write_json(folder / "config.json", config, sealed=True)


def load_export(folder: Path, backend: str = "eager", device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Reads an exported model: the GPT in eval mode on `device`, its tokenizer, and config.json.

    The folder may come from anybody. Raises UserError where a file is missing, damaged, of a later format, holds something else
    than an export, or does not fit the others.
    """
    config = read_config(folder)
    for name in ("model.safetensors", "tokenizer.json"):
        _check(folder, name, config)
    source = folder / "model.safetensors"
    weights = load_tensors(source)
    try:
        cfg = from_plain(ModelConfig, config["model"])
        _refuse_larger(cfg, weights)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'} describes no model of this version ({error}); export again") from None
    for name, weight in weights.items():
        if not (weight.is_floating_point() and weight.isfinite().all()):
            raise UserError(f"{source} holds no trained model: {name} is not made of finite numbers; export again")
    model = GPT(cfg, backend=backend)
    load_weights(model, weights, source)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > model.embedding.num_embeddings:
        raise UserError(
            f"{folder / 'tokenizer.json'} is another model's: it has {tokenizer.vocab_size} tokens, and the model "
            f"{model.embedding.num_embeddings}; copy it again from its run"
        )
    return model.to(device).eval(), tokenizer, config


def _refuse_larger(cfg: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
    """Raises UserError for a model that these weights cannot be, before its own are made, which may be more than any memory."""
    if cfg.vocab_size is None:
        raise UserError("vocab_size is None")
    learned = cfg.max_seq_len if cfg.position == "learned" else 0
    tables = cfg.d_model * max(cfg.vocab_size, learned, cfg.n_layer * max(cfg.d_model, cfg.hidden_dim))
    n = sum(weight.numel() for weight in weights.values())
    if cfg.n_layer > len(weights) or tables > n:
        raise UserError(f"it is larger than the {n:,} numbers of model.safetensors")


def load_windows(folder: Path, config: dict[str, Any]) -> Windows:
    """The validation windows of an exported model: "tokens" int64 [N, S + 1] and maybe "document_ids" int32 [N, S].

    Raises UserError where the file is missing, damaged, or holds something else than windows of the model's tokens.
    """
    path = folder / WINDOWS
    _check(folder, path.name, config)
    windows = load_tensors(path)
    if (reason := _no_windows(windows, config["model"].get("vocab_size"))) is not None:
        raise UserError(f"{path} holds no windows to evaluate on ({reason}); export again")
    return {**windows, "tokens": windows["tokens"].long()}


def _no_windows(windows: Windows, vocab_size: Any) -> str | None:
    """What is wrong with validation windows; None where nothing is."""
    names = {*windows}
    if names not in ({"tokens"}, {"tokens", "document_ids"}):
        return f"it has {', '.join(sorted(names)) or 'nothing'}"
    if any(rows.dtype not in (torch.int32, torch.int64) or rows.dim() != 2 for rows in windows.values()):
        return "they are not rows of whole numbers"
    tokens = windows["tokens"]
    if len(tokens) == 0 or tokens.shape[1] < 2:
        return f"their shape is {tuple(tokens.shape)}"
    if not (isinstance(vocab_size, int) and tokens.min() >= 0 and tokens.max() < vocab_size):
        return "a token is not in the vocabulary"
    ids = windows.get("document_ids")
    if ids is not None and (ids.shape != (len(tokens), tokens.shape[1] - 1) or (ids < 0).any() or (ids.diff(dim=1) < 0).any()):
        return "document_ids are not those of the tokens"
    return None


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
    if DIGEST in config and not is_sealed(config):
        raise UserError(f"{folder / 'config.json'} was changed since export; copy it again, or export again")
    missing = [key for key in ("model", "training", "data", "sha256") if not isinstance(config.get(key), dict)]
    if missing:
        raise UserError(f"{folder / 'config.json'} has no {missing[0]}; export again")
    known = config.get("wandb", {})
    if not isinstance(known, dict) or (known and not isinstance(known.get("id"), str)):
        raise UserError(f"{folder / 'config.json'}: wandb is not a run that wandb knows; export again")
    return config


def _check(folder: Path, name: str, config: dict[str, Any]) -> None:
    """Raises UserError where a file of an exported model is missing or has changed since export."""
    if not (folder / name).is_file():
        raise UserError(f"{folder / name} is missing from the exported model; copy it again, or export again")
    if checksum(folder / name) != config["sha256"].get(name):
        raise UserError(f"{folder / name} is damaged: its checksum is not the one in config.json; copy it again, or export again")
