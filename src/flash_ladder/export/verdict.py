"""What export and evaluate report of a model: losses and checks, as tables for the screen and as plain data for a JSON file."""

from __future__ import annotations

from typing import Any

import torch

from flash_ladder.export.losses import Evaluation, Windows
from flash_ladder.export.parity import Check, Parity, loss_limit
from flash_ladder.kernels.generations import describe
from flash_ladder.model.loss import perplexity


def describe_windows(windows: Windows) -> str:
    """The size of a set of windows in words."""
    n, length = windows["tokens"].shape
    rest = f" and one of {windows['rest'].shape[1] - 1}" if "rest" in windows else ""
    return f"{n} window{'s' * (n != 1)} of {length - 1} tokens{rest}"


def same_loss(name: str, loss: float, evaluation: Evaluation, rounding: float) -> Check:
    """Checks that an evaluation found the loss recorded earlier on the same windows."""
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
    """Prints losses and checks as tables, and where the result was written; returns the exit code."""
    print("\n" + align(loss_rows(losses)))
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


def loss_rows(losses: dict[str, float]) -> list[list[str]]:
    """Losses and their perplexities as a table's rows."""
    return [
        ["", *losses],
        ["loss (nats per token)", *(f"{loss:.6f}" for loss in losses.values())],
        ["perplexity", *(f"{perplexity(loss):.4f}" for loss in losses.values())],
    ]


def align(rows: list[list[str]]) -> str:
    """Rows of cells as lines of columns, the first one aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
