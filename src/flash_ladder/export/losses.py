"""Loss and perplexity of a model on windows of tokens, with a given attention backend and precision.

It goes a batch at a time. Logits stay in the precision they come in, and model/loss.py takes them a piece at a time. Sums over
tokens are float64.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from flash_ladder.errors import UserError
from flash_ladder.machine.decide import DTYPES
from flash_ladder.model.gpt import GPT
from flash_ladder.model.loss import token_losses

# "tokens" int64 [N, S + 1], and maybe "document_ids" int32 [N, S] or, of a text that goes on, "rest" int64 [1, R + 1] with R < S.
Windows = dict[str, Tensor]

BATCH_WINDOWS = 32  # windows of a batch where batch_size is None; fewer where BATCH_ELEMENTS asks for it
BATCH_ELEMENTS = 2**28  # limit on a batch's logits, and on a layer's attention scores: 1 GiB in float32


@dataclass(frozen=True)
class Evaluation:
    """A model's loss on windows of tokens."""

    backend: str
    precision: str
    loss: float  # nats per token
    n_tokens: int
    seconds: float
    window_losses: list[float]  # mean loss of each window


@torch.no_grad()
def evaluate(model: GPT, windows: Windows, *, backend: str, precision: str = "32", batch_size: int | None = None) -> Evaluation:
    """Mean cross-entropy of predicting each token of the windows from those before it. Shows a progress bar.

    windows: on any device. backend: a name, not "auto".
    precision: "32", "bf16-mixed" or "16-mixed". batch_size: windows at once; None: up to 32, with logits under 1 GiB.
    Raises UserError where a batch does not fit in the GPU's memory.
    """
    start = time.perf_counter()
    losses = [
        token_losses(logits(model, batch, backend, precision), batch["tokens"][:, 1:])
        for batch in batches(model, windows, batch_size, backend)
    ]
    return summarise(backend, precision, losses, time.perf_counter() - start)


def batches(model: GPT, windows: Windows, batch_size: int | None, label: str) -> Iterator[dict[str, Tensor]]:
    """The windows, batch by batch on the model's device, behind a progress bar."""
    n, seq_len = len(windows["tokens"]), windows["tokens"].shape[1] - 1
    if batch_size is None:
        per_window = seq_len * max(model.embedding.num_embeddings, model.cfg.n_head * seq_len)
        batch_size = max(1, min(BATCH_WINDOWS, BATCH_ELEMENTS // per_window))
    device = model.embedding.weight.device
    model.eval()
    with tqdm(total=n, desc=label, unit="window", leave=False, delay=1) as bar:
        for start in range(0, n, batch_size):
            yield {name: rows[start : start + batch_size].to(device) for name, rows in windows.items() if name != "rest"}
            bar.update(min(batch_size, n - start))
        if "rest" in windows:
            yield {"tokens": windows["rest"].to(device)}


def logits(model: GPT, batch: dict[str, Tensor], backend: str, precision: str) -> Tensor:
    """The model's logits [B, S, V] on a batch, in the precision's dtype."""
    tokens = batch["tokens"][:, :-1]
    model.backend = backend
    try:
        with autocast(tokens.device, precision):
            return model(tokens, document_ids=batch.get("document_ids"))
    except torch.OutOfMemoryError:
        less = "batch_size=1 needs less" if len(tokens) > 1 else "scripts/export.py with seq_len=N takes shorter windows"
        raise UserError(
            f"{backend} attention does not fit in the GPU's memory with {len(tokens)} windows of {tokens.shape[1]} tokens; {less}"
        ) from None


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """torch.autocast as Lightning's mixed precisions use it; nothing for "32"."""
    return nullcontext() if precision == "32" else torch.autocast(device.type, DTYPES[precision])


def summarise(backend: str, precision: str, losses: list[Tensor], seconds: float) -> Evaluation:
    """The evaluation from the token losses [B, S] of every batch."""
    per_token = torch.cat([batch.flatten() for batch in losses]).double()
    per_window = [loss for batch in losses for loss in batch.double().mean(1).tolist()]
    return Evaluation(backend, precision, per_token.mean().item(), per_token.numel(), seconds, per_window)
