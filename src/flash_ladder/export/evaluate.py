"""What scripts/evaluate.py does: an exported model, evaluated again from its folder alone, maybe on another machine.

What export recorded is what it must find again. The tables, here and in export.py, are made at the end of this file.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_ladder.data.tokenizer import Tokenizer
from flash_ladder.errors import UserError
from flash_ladder.export.folder import load_export, load_windows
from flash_ladder.export.losses import Evaluation, evaluate, perplexity, pick_backend, pick_device
from flash_ladder.export.parity import Check, Parity, compare, loss_limit
from flash_ladder.files import read_json, write_json
from flash_ladder.kernels.generations import describe
from flash_ladder.machine.decide import DTYPES
from flash_ladder.script_schema import EvaluateConfig

Windows = dict[str, Tensor]  # "tokens" int64 [N, S + 1] and maybe "document_ids" int32 [N, S]


def evaluate_export(cfg: EvaluateConfig) -> int:
    """Evaluates an exported model on a backend of this machine, prints a table; returns 1 where a figure is beyond its limit.

    The loss is held against what export recorded on the same windows; with cfg.against the logits against another backend's.
    Raises UserError where the folder or the text cannot be read and where a backend cannot run here.
    """
    folder = Path(cfg.model)
    device = pick_device(cfg.device)
    model, tokenizer, config = load_export(folder, device=device)
    recorded = recorded_by_export(folder / "parity.json")
    precision = recorded["precision"] if cfg.precision == "auto" else cfg.precision
    windows = load_windows(folder, config) if cfg.text is None else text_windows(Path(cfg.text), tokenizer, config)
    windows = {name: rows[: cfg.windows] for name, rows in windows.items()}
    documents = "document_ids" in windows
    choice = pick_backend(cfg.attention, model.cfg, device, precision, documents)
    print(f"attention: {choice}")
    print(f"evaluating: {described(windows)}, precision {precision}, {describe(device)}")

    parity, checks = None, []
    coarser = torch.finfo(DTYPES[precision]).eps > torch.finfo(DTYPES[recorded["precision"]]).eps
    options = {"backend": choice.backend, "precision": precision, "batch_size": cfg.batch_size}
    if cfg.against is not None:
        against = pick_backend(cfg.against, model.cfg, device, precision, documents).backend
        parity = compare(model, windows, against=against, **options)
        evaluation, checks = parity.candidate, parity.checks()
    elif coarser and cfg.text is None:  # rounding in this precision was not measured by export
        parity = compare(model, windows, against=choice.backend, **options)
        evaluation = parity.candidate
    else:
        evaluation = evaluate(model, windows, **options)

    losses = {choice.backend: evaluation.loss}
    if cfg.against is not None:
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
    return report(losses, checks, f"{choice.backend} against {cfg.against}" if cfg.against else choice.backend, where)


def recorded_by_export(path: Path) -> dict[str, Any]:
    """Precision, backend, rounding and window losses of the training's backend, from parity.json.

    Raises UserError where that is missing or not a record of finite losses.
    """
    found = read_json(path)
    try:
        recorded = {key: found[key] for key in ("precision", "backend", "rounding")}
        recorded["window_losses"] = [float(loss) for loss in found["window_losses"][found["backend"]]]
        loss_limit(recorded["rounding"], len(recorded["window_losses"]))
    except (KeyError, TypeError, ZeroDivisionError):
        raise UserError(f"{path} holds no finite losses to compare with; export again") from None
    return recorded


def text_windows(path: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> Windows:
    """A text file as windows of the length that the model was trained with; one shorter window where there is less text.

    Raises UserError where the file is missing, is no text, or has fewer than two tokens.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"text={path} cannot be read ({error.strerror}); name a text file") from None
    except UnicodeDecodeError:
        raise UserError(f"text={path} is not text (its bytes are not UTF-8)") from None
    tokens = torch.tensor(tokenizer.encode(text))
    if len(tokens) < 2:
        raise UserError(f"text={path} is {len(tokens)} tokens long; a prediction needs at least 2")
    seq_len = min(config["data"]["seq_len"], len(tokens) - 1)
    return {"tokens": tokens.unfold(0, seq_len + 1, seq_len)}


# ---- what both say ----


def described(windows: Windows) -> str:
    """The size of a set of windows in words."""
    n, length = windows["tokens"].shape
    return f"{n} window{'s' * (n != 1)} of {length - 1} tokens"


def same_loss(name: str, loss: float, evaluation: Evaluation, rounding: float) -> Check:
    """Whether an evaluation found the loss that was recorded earlier on the same windows."""
    return Check(f"|Δ loss| to {name}", abs(evaluation.loss - loss), loss_limit(rounding, evaluation.n_tokens))


def verdict(checks: list[Check]) -> dict[str, Any]:
    """Checks as plain data for a JSON file."""
    figures = {c.name: {"value": c.value, "limit": c.limit, "within": c.within} for c in checks}
    return {"within": all(c.within for c in checks), "checks": figures}


def record(parity: Parity, checks: list[Check], device: torch.device) -> dict[str, Any]:
    """A comparison as plain data for a JSON file."""
    both = (parity.candidate, parity.against)
    return {
        **verdict(checks),
        "backend": parity.candidate.backend,
        "against": parity.against.backend,
        "precision": parity.candidate.precision,
        "device": describe(device),
        "n_tokens": parity.candidate.n_tokens,
        "loss": {e.backend: e.loss for e in both},
        "perplexity": {e.backend: perplexity(e.loss) for e in both},
        "mean_kl": parity.mean_kl,
        "rounding": parity.rounding,
        "max_logit_difference": parity.max_logit_difference,
        "mean_logit_difference": parity.mean_logit_difference,
        "greedy_agreement": parity.greedy_agreement,
        "clear_greedy_agreement": parity.clear_greedy_agreement,
        "window_losses": {e.backend: e.window_losses for e in both},
    }


def report(losses: dict[str, float], checks: list[Check], compared: str, where: str | None) -> int:
    """Prints losses and checks as tables and says where the result lies; returns the exit code."""
    rows = [["", *losses]]
    rows.append(["loss (nats per token)", *(f"{loss:.6f}" for loss in losses.values())])
    rows.append(["perplexity", *(f"{perplexity(loss):.4f}" for loss in losses.values())])
    print("\n" + align(rows))
    if checks:
        rows = [[compared, "figure", "limit", ""]]
        rows += [[c.name, *c.words, "" if c.limit is None else "ok" if c.within else "BEYOND"] for c in checks]
        print("\n" + align(rows))
    print()
    beyond = [f"{c.name} is {c.words[0]}, its limit {c.words[1]}" for c in checks if not c.within]
    if beyond:
        print(f"beyond tolerance: {'; '.join(beyond)}")
    if where:
        print(where)
    return 1 if beyond else 0


def align(rows: list[list[str]]) -> str:
    """Rows of cells as lines of columns, the first set to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
