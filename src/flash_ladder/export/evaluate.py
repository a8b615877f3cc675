"""What scripts/evaluate.py does: an exported model, evaluated again from its folder alone, maybe on another machine.

The evaluation must find again what export recorded.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from flash_ladder.data.tokenizer import Tokenizer
from flash_ladder.errors import UserError
from flash_ladder.export.folder import load_export, load_windows
from flash_ladder.export.losses import Windows, evaluate
from flash_ladder.export.parity import compare
from flash_ladder.export.verdict import describe_windows, record, report, same_loss, verdict
from flash_ladder.files import DIGEST, check_file, is_sealed, read_json, read_text, write_json
from flash_ladder.kernels.generations import describe
from flash_ladder.machine.decide import DTYPES, check_precision, pick_backend, pick_device
from flash_ladder.names import BACKENDS
from flash_ladder.script_schema import EvaluateConfig


def evaluate_export(cfg: EvaluateConfig) -> int:
    """Evaluates an exported model on a backend of this machine and prints a table; returns 1 where a figure is beyond its limit.

    It compares the loss with what export recorded on the same windows and, with cfg.against, the logits with another backend's.
    Raises UserError where the folder or the text cannot be read and where a backend cannot run here.
    """
    folder = Path(cast("str", cfg.model))  # validate() refuses a missing one
    if cfg.out is not None:
        check_file(Path(cfg.out), "out")
    device = pick_device(cfg.device)
    model, tokenizer, config = load_export(folder, device=device)
    windows = load_windows(folder, config)
    recorded = recorded_by_export(folder / "parity.json", len(windows["tokens"]))
    precision = recorded["precision"] if cfg.precision == "auto" else cfg.precision
    check_precision(precision, device, "precision")
    if cfg.text is not None:
        windows = text_windows(Path(cfg.text), tokenizer, config)
    if cfg.windows is not None:
        windows = first_windows(windows, cfg.windows)
    documents = "document_ids" in windows
    choice = pick_backend(cfg.attention, model.cfg, device, precision, documents)
    print(f"attention: {choice}")
    print(f"evaluating: {describe_windows(windows)}, precision {precision}, {describe(device)}")

    parity, checks = None, []
    coarser = torch.finfo(DTYPES[precision]).eps > torch.finfo(DTYPES[recorded["precision"]]).eps
    options: dict[str, Any] = {"backend": choice.backend, "precision": precision, "batch_size": cfg.batch_size}
    if cfg.against is not None:
        against = pick_backend(cfg.against, model.cfg, device, precision, documents).backend
        parity = compare(model, windows, against=against, **options)
        evaluation, checks = parity.candidate, parity.checks()
    elif coarser and cfg.text is None:  # export measured no rounding in this precision
        parity = compare(model, windows, against=choice.backend, **options)
        evaluation = parity.candidate
    else:
        evaluation = evaluate(model, windows, **options)

    losses = {choice.backend: evaluation.loss}
    if parity is not None and cfg.against is not None:
        losses[parity.against.backend] = parity.against.loss
    if cfg.text is None:
        name = f"export ({recorded['backend']})"
        window_losses = recorded["window_losses"][: cfg.windows]
        loss = sum(window_losses) / len(window_losses)
        losses = {name: loss, **losses}
        rounding = max(recorded["rounding"], parity.rounding if parity else 0.0)
        checks.append(same_loss(name, loss, evaluation, rounding))
    where = None
    if cfg.out is not None:
        result = {"model": str(folder), "text": cfg.text, "device": describe(device), "evaluation": asdict(evaluation)}
        write_json(Path(cfg.out), result | verdict(checks) | ({"parity": record(parity, [], device)} if parity else {}))
        where = f"written to {cfg.out}"
    code = report(losses, checks, f"{choice.backend} against {cfg.against}" if cfg.against else choice.backend, where)
    if cfg.text is None and cfg.wandb != "disabled" and (config.get("wandb") or cfg.wandb != "auto"):
        # Lightning and wandb: a machine that has the exported folder alone need have neither.
        from flash_ladder.export.to_wandb import log_evaluation, wandb_of_export

        if target := wandb_of_export(folder, config, cfg.wandb):
            step = config["training"]["step"]
            log_evaluation(*target, cfg.wandb, evaluation, parity, checks, describe(device), step)
    return code


def first_windows(windows: Windows, n: int) -> Windows:
    """The first `n` windows, the shorter one at the end of a text among them."""
    whole = {name: rows[:n] for name, rows in windows.items() if name != "rest"}
    rest = {"rest": windows["rest"]} if "rest" in windows and n > len(windows["tokens"]) else {}
    return whole | rest


def recorded_by_export(path: Path, n_windows: int) -> dict[str, Any]:
    """Precision, backend, rounding and the losses of the `n_windows` windows on the training's backend, from parity.json.

    Raises UserError where that file is missing, was changed, or is no record of finite losses.
    """
    found = read_json(path)
    if isinstance(found, dict) and DIGEST in found and not is_sealed(found):
        raise UserError(f"{path} was changed since export; copy it again, or export again")
    try:
        recorded = {key: found[key] for key in ("precision", "backend", "rounding")}
        losses = recorded["window_losses"] = list(found["window_losses"][found["backend"]])
    except (KeyError, TypeError):
        recorded, losses = {}, []
    numbers = [recorded.get("rounding"), *losses]
    finite = all(type(number) in (int, float) and 0 <= number < math.inf for number in numbers)
    if not finite or len(losses) != n_windows or recorded["backend"] not in BACKENDS or str(recorded["precision"]) not in DTYPES:
        raise UserError(f"{path} holds no finite losses of the {n_windows} windows to compare with; export again")
    return recorded


def text_windows(path: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> Windows:
    """A text file, to its last byte, as windows of the training's length and a shorter one ("rest") of what is left.

    Raises UserError where the file is missing, is no text, or has fewer than two tokens.
    """
    tokens = torch.tensor(tokenizer.encode(read_text(path, "text")))
    if len(tokens) < 2:
        raise UserError(f"text={path} is {len(tokens)} tokens long; a prediction needs at least 2")
    seq_len = config["data"].get("seq_len")
    if type(seq_len) is not int or seq_len < 1:
        raise UserError(f"the model's config.json has no length of a window (data.seq_len is {seq_len!r}); export again")
    seq_len = min(seq_len, len(tokens) - 1)
    windows = {"tokens": tokens.unfold(0, seq_len + 1, seq_len)}
    rest = tokens[len(windows["tokens"]) * seq_len :]
    return windows | ({"rest": rest[None]} if len(rest) > 1 else {})
