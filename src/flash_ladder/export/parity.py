"""Whether two attention backends make the same model: compares their logits on the same windows, and sets the limits.

No constant would do as the limit, since rounding grows with a model's depth and the size of its logits. So rounding is measured.
In bf16 and fp16, eager attention also runs in float32 on the same windows; the mean KL divergence between the two is what rounding
alone does to this model. Every limit follows from that one number, "rounding":

    mean KL        at most 3 · rounding + 1e-8. Two independent roundings of one size give 2. A backend that rounds less than
                   eager, as the flash rungs do, gives less. The 1e-8 is for float32: it allows logits 1e-4 apart (root mean
                   square), some hundred times the effect of sums in another order.
    loss           at most KL + 5 sqrt(2 KL / N) apart, over N tokens and with the limit above for KL. A token's loss moves by
                   about sqrt(2 KL) up or down, so the mean of N moves by that over sqrt(N). Five times that is no accident.
    greedy tokens  the same for 99.9 % of the clear tokens, those whose two likeliest logits are at least 16 sqrt(2 KL) apart.
                   Where they are nearer, rounding may decide.

A wrong mask, a missing scale or a dropped tile is far outside (a byte-level model of 4 layers after 400 steps, 16 windows of 256,
mean KL over its limit):

                                                       float32   fp16   bf16
    sdpa                                                  2e-5    0.4    0.4
    the mask lets one later key through                    5e6    1e4    220
    a scale of 1 instead of 1/sqrt(head_dim)               3e7    7e4   1200
    a tile of 64 keys dropped for half of the queries      2e6    5e3     75
    a tile of 32 keys dropped for the last 32 queries      9e3     26    0.5
    a scale 2 % too large                                  1e4     32    0.9

The last two lines show the end of what bf16 can tell: its rounding hides smaller faults. precision=32 finds them.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_ladder.export.losses import Evaluation, Windows, batches, logits, summarise
from flash_ladder.model.gpt import GPT
from flash_ladder.model.loss import chunks, token_losses, wide

ROUNDING_FACTOR = 3.0
KL_FLOOR = 1e-8
LOSS_DEVIATIONS = 5.0
CLEAR_DEVIATIONS = 16.0
CLEAR_AGREEMENT = 0.999


def kl_limit(rounding: float, floor: float = KL_FLOOR) -> float:
    """The largest allowed mean KL between two backends, in nats per token, from rounding's mean KL.

    floor: 0 where rounding was measured in float32 too, against float64.
    """
    return ROUNDING_FACTOR * rounding + floor


def loss_limit(rounding: float, n_tokens: int, floor: float = KL_FLOOR) -> float:
    """The largest allowed difference between two backends' losses over `n_tokens`, from rounding's mean KL; as `kl_limit`."""
    limit = kl_limit(rounding, floor)
    return limit + LOSS_DEVIATIONS * math.sqrt(2 * limit / n_tokens)


def clear_margin(rounding: float, floor: float = KL_FLOOR) -> float:
    """How far apart a token's two likeliest logits are at least, if rounding is not to swap them; as `kl_limit`."""
    return CLEAR_DEVIATIONS * math.sqrt(2 * kl_limit(rounding, floor))


@dataclass(frozen=True)
class Check:
    """A figure and its limit; with `limit` None it is reported, not judged."""

    name: str
    value: float
    limit: float | None = None
    is_share: bool = False  # a share may not be under its limit, any other figure not over it

    @property
    def within(self) -> bool:
        """False for nan."""
        if self.limit is None:
            return True
        return self.value >= self.limit if self.is_share else self.value <= self.limit

    @property
    def share_of_limit(self) -> float:
        """How much of what its limit allows a figure uses up: 1 is the limit. inf for nan, and beyond a limit of 0."""
        limit = math.nan if self.limit is None else self.limit
        used, allowed = (1 - self.value, 1 - limit) if self.is_share else (self.value, limit)
        if math.isnan(used):
            return math.inf
        return used / allowed if allowed else math.inf if used else 0.0

    @property
    def words(self) -> tuple[str, str]:
        """Value and limit as text."""
        style = "{:.3%}" if self.is_share else "{:.2e}"
        return style.format(self.value), "" if self.limit is None else style.format(self.limit)


@dataclass(frozen=True)
class Parity:
    """Two backends on the same windows in the same precision."""

    candidate: Evaluation
    against: Evaluation
    mean_kl: float  # KL(against || candidate), nats per token
    rounding: float  # mean KL between eager (or `against`) in float32 and in this precision; 0 where this is float32
    max_logit_difference: float
    mean_logit_difference: float
    greedy_agreement: float  # share of tokens whose likeliest next token is the same
    clear_greedy_agreement: float  # that share, among the tokens that `against` is clear about

    @property
    def within(self) -> bool:
        """Whether the two backends agree to rounding."""
        return all(check.within for check in self.checks())

    def checks(self) -> list[Check]:
        """Every figure beside its limit."""
        loss = abs(self.candidate.loss - self.against.loss)
        return [
            Check("|Δ loss|", loss, loss_limit(self.rounding, self.candidate.n_tokens)),
            Check("mean KL", self.mean_kl, kl_limit(self.rounding)),
            Check("equal greedy tokens, of the clear ones", self.clear_greedy_agreement, CLEAR_AGREEMENT, is_share=True),
            Check("equal greedy tokens", self.greedy_agreement, is_share=True),
            Check("max |Δ logit|", self.max_logit_difference),
            Check("mean |Δ logit|", self.mean_logit_difference),
        ]


@torch.no_grad()
def compare(
    model: GPT,
    windows: Windows,
    *,
    backend: str,
    against: str = "eager",
    precision: str = "32",
    batch_size: int | None = None,
) -> Parity:
    """Runs the model on two backends and compares the logits; arguments as in `losses.evaluate`.

    It goes batch by batch, with the logits of two runs in memory at a time; sums are float64. It measures rounding with eager
    attention where that is one of the two backends, else with `against`.
    """
    start = time.perf_counter()
    trusted = "eager" if backend == "eager" else against
    apart, rounding = Difference(), Difference()
    losses: dict[str, list[Tensor]] = {"candidate": [], "against": []}

    def take_in(batch: dict[str, Tensor]) -> None:  # a function, so that its logits are freed before the next batch's
        targets = batch["tokens"][:, 1:]
        reference = logits(model, batch, against, precision)
        candidate = reference if backend == against else logits(model, batch, backend, precision)
        losses["against"].append(token_losses(reference, targets))
        losses["candidate"].append(token_losses(candidate, targets))
        apart.add(reference, candidate)
        if precision != "32":
            rounded = candidate if trusted == backend else reference
            del reference, candidate
            rounding.add(logits(model, batch, trusted, "32"), rounded)

    for batch in batches(model, windows, batch_size, f"{backend} against {against}"):
        take_in(batch)
    seconds = time.perf_counter() - start
    noise = rounding.mean_kl if precision != "32" else 0.0
    return Parity(
        candidate=summarise(backend, precision, losses["candidate"], seconds),
        against=summarise(against, precision, losses["against"], seconds),
        mean_kl=apart.mean_kl,
        rounding=noise,
        max_logit_difference=apart.max_difference,
        mean_logit_difference=apart.mean_difference,
        greedy_agreement=apart.agreement(0.0),
        clear_greedy_agreement=apart.agreement(clear_margin(noise)),
    )


class Difference:
    """The difference between two sets of logits, gathered batch by batch: in float64 where one of them is, else in float32."""

    def __init__(self) -> None:
        self.n_logits = 0
        self.sums: list[Tensor] = []  # of each chunk, float64 [2, n]: each token's sum of |difference| of the logits, and KL
        self.maxima: list[Tensor] = []  # of each chunk: the largest |difference|
        self.same: list[Tensor] = []  # of each token: whether both have the same likeliest next token
        self.margins: list[Tensor] = []  # of each token: how far apart the reference's two likeliest logits are

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Takes in the logits [B, S, V] of one batch."""
        self.n_logits += reference.numel()
        dtype = wide(torch.promote_types(reference.dtype, other.dtype))
        for p, q in chunks(reference, other):
            p, q = p.to(dtype), q.to(dtype)
            difference = (p - q).abs()
            best, second = p.topk(2, dim=-1).values.unbind(-1)
            self.margins.append(best - second)
            self.same.append(p.argmax(-1) == q.argmax(-1))  # among equals argmax takes the first, topk need not
            self.maxima.append(difference.max())
            # sum p (log p - log q), plus sum q - sum p = 0: every term is positive, and a small one keeps its digits.
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            kl = p.exp() * (torch.expm1(q - p) - (q - p))
            self.sums.append(torch.stack((difference.sum(-1), kl.sum(-1))).double())

    @property
    def token_kl(self) -> Tensor:
        """KL(reference || other) of each token, float64 [N], in the order of the batches."""
        return torch.cat(self.sums, 1)[1]

    def _total(self, which: int) -> float:
        return torch.stack([chunk.sum(-1) for chunk in self.sums]).sum(0)[which].item()

    @property
    def mean_difference(self) -> float:
        return self._total(0) / self.n_logits

    @property
    def max_difference(self) -> float:
        return torch.stack(self.maxima).max().item()

    @property
    def mean_kl(self) -> float:
        return self._total(1) / sum(len(tokens) for tokens in self.same)

    def clear(self, margin: float) -> Tensor:
        """Of each token, whether the reference's two likeliest logits are at least `margin` apart, bool [N]."""
        return torch.cat(self.margins) >= margin

    def agreement(self, margin: float) -> float:
        """Share of tokens with the same likeliest successor, among those whose margin is at least `margin`; 1 if there are none."""
        clear = self.clear(margin)
        return torch.cat(self.same)[clear].double().mean().item() if clear.any() else 1.0
