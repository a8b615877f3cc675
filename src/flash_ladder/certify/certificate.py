"""The certificate: two implementations of attention and eager, each beside a float64 forward of the same model on the same text.

Every limit follows from two measurements on the model at hand, in the dtype at hand, by the rules of export/parity.py:

    eager's error   the mean KL divergence from the float64 forward to the model with transformers' eager attention
    noise floor     the mean KL divergence between eager and eager with the same windows in batches of two

"Rounding" is the larger of the two. There is no floor beside it: against float64 it is measured in float32 too.

    mean KL         to float64, and between the two implementations: at most 3 · rounding
    worst eighth    the same where a fault may hide, in each eighth of a window: at most 3 · (eager's own there, or rounding where
                    that is larger, and five standard errors of it)
    loss            at most KL + 5 sqrt(2 KL / N) apart
    greedy tokens   those of float64 for 99.9 % of the tokens whose two likeliest are at least 16 sqrt(2 KL) apart in float64
    continuation    where two greedy continuations part, float64 must find both tokens nearly as good: their logits are at most
                    16 sqrt(2 KL) under its best
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from tqdm import tqdm

from flash_ladder.certify.causal_lm import TRUSTED, CausalLM, Implementation
from flash_ladder.errors import UserError
from flash_ladder.export.parity import CLEAR_AGREEMENT, LOSS_DEVIATIONS, Check, Difference, clear_margin, kl_limit, loss_limit
from flash_ladder.model.loss import token_losses

STRETCHES = 8  # of a window, that are looked at one by one
BINS = 64  # at most, of the positions in a window
PROMPT = 32  # tokens that a continuation begins with


@dataclass(frozen=True)
class Run:
    """One implementation beside the float64 forward."""

    loss: float  # nats per token
    mean_kl: float  # KL(float64 || it), nats per token
    max_logit_difference: float
    mean_logit_difference: float
    clear_agreement: float  # share of the clear tokens whose likeliest successor is float64's
    agreement: float  # that share of all tokens
    worst_stretch: tuple[float, float]  # the mean KL, and its limit, of the eighth of a window where it is nearest to its limit
    kl_by_position: list[float]  # mean KL of each bin of positions


@dataclass(frozen=True)
class Parting:
    """Two greedy continuations of one prompt."""

    n_tokens: int  # that were compared, the first different ones included
    at: int | None  # how many are the same before the first different ones; None: all are
    gap: float  # how far the worse of those two lies under float64's likeliest, in logits; 0 where all are the same


@dataclass(frozen=True)
class Certificate:
    """What a and b come to on N = n_windows · seq_len predicted tokens."""

    a: str
    b: str
    n_windows: int
    seq_len: int
    exact_loss: float  # of the float64 forward
    runs: dict[str, Run]  # of a, b and eager, by label
    mean_kl: float  # KL(b || a)
    max_logit_difference: float  # between a and b
    greedy_agreement: float  # between a and b
    noise: float  # KL(eager || eager in another batch split)
    rounding: float
    clear_share: float  # of the tokens: those that float64 is clear about
    positions: list[float]  # the middle of each bin of positions
    parting: Parting | None  # None: no continuation was asked for

    def checks(self) -> list[Check]:
        """Every figure that is judged beside its limit; eager itself is not judged."""
        kl, found = kl_limit(self.rounding, floor=0), []
        for label in dict.fromkeys((self.a, self.b)):
            if label != TRUSTED:
                run = self.runs[label]
                found += [
                    Check(f"{label}: mean KL to float64", run.mean_kl, kl),
                    Check(f"{label}: mean KL to float64, worst eighth", *run.worst_stretch),
                    Check(f"{label}: float64's clear greedy tokens", run.clear_agreement, CLEAR_AGREEMENT, is_share=True),
                ]
        loss = abs(self.runs[self.a].loss - self.runs[self.b].loss)
        found += [
            Check(f"{self.a} to {self.b}: mean KL", self.mean_kl, kl),
            Check(f"{self.a} to {self.b}: |Δ loss|", loss, loss_limit(self.rounding, self.n_windows * self.seq_len, floor=0)),
        ]
        if self.parting is not None:
            found.append(Check(f"{self.a} to {self.b}: greedy parting", self.parting.gap, clear_margin(self.rounding, floor=0)))
        return found

    @property
    def within(self) -> bool:
        """Whether a and b are the same model, to rounding."""
        return all(check.within for check in self.checks())


# ---- measuring ----


def certify(lm: CausalLM, tokens: Tensor, a: Implementation, b: Implementation, n_continued: int) -> Certificate:
    """Measures a, b and eager on windows, tokens int64 [N, S + 1], one at a time, and greedy continuations by `n_continued` tokens.

    Shows progress. Raises UserError where one of them cannot run here, and where eager attention itself gives no finite logits.
    """
    eager = Implementation(TRUSTED, TRUSTED)
    several = list(dict.fromkeys((a, b, eager)))
    apart = {one: Difference() for one in several}
    between, noise = Difference(), Difference()
    losses: dict[Implementation | None, list[Tensor]] = {one: [] for one in (None, *several)}

    def take_in(window: Tensor, beside: Tensor) -> None:  # a function, so that its logits are freed before the next window's
        context, targets = window[:, :-1], window[:, 1:]
        exact = lm.exact_logits(context)
        losses[None].append(token_losses(exact, targets))
        found = {one: lm.logits(one, context) for one in several}
        if not found[eager].isfinite().all():
            raise UserError(f"eager attention gives logits that are not finite in {lm.dtype}; dtype=float32 would work")
        for one, logits in found.items():
            losses[one].append(token_losses(logits.double(), targets))
            apart[one].add(exact, logits)
        between.add(found[b].double(), found[a])
        noise.add(found[eager].double(), lm.logits(eager, torch.cat((context, beside[:, :-1])))[:1])

    n, seq_len = tokens.shape[0], tokens.shape[1] - 1
    for i in tqdm(range(n), desc=f"{a.label} and {b.label} beside float64", unit="window", leave=False, delay=1):
        take_in(*(tokens[[j % n]].to(lm.device) for j in (i, i + 1)))
    rounding = max_or_nan(apart[eager].mean_kl, noise.mean_kl)
    margin = clear_margin(rounding, floor=0)
    by_token = {one: difference.token_kl.view(n, seq_len) for one, difference in apart.items()}
    return Certificate(
        a=a.label,
        b=b.label,
        n_windows=n,
        seq_len=seq_len,
        exact_loss=torch.cat(losses[None]).mean().item(),
        runs={
            one.label: Run(
                loss=torch.cat(losses[one]).mean().item(),
                mean_kl=difference.mean_kl,
                max_logit_difference=difference.max_difference,
                mean_logit_difference=difference.mean_difference,
                clear_agreement=difference.agreement(margin),
                agreement=difference.agreement(0.0),
                worst_stretch=worst_stretch(by_token[one], by_token[eager], rounding),
                kl_by_position=[part.mean().item() for part in bins(by_token[one])],
            )
            for one, difference in apart.items()
        },
        mean_kl=between.mean_kl,
        max_logit_difference=between.max_difference,
        greedy_agreement=between.agreement(0.0),
        noise=noise.mean_kl,
        rounding=rounding,
        clear_share=apart[eager].clear(margin).double().mean().item(),
        positions=[part.double().mean().item() for part in bins(torch.arange(1, seq_len + 1)[None])],
        parting=continuations(lm, tokens[:1, :PROMPT].to(lm.device), a, b, n_continued) if n_continued else None,
    )


def max_or_nan(*values: float) -> float:
    """The largest, or nan where one of them is: Python's own max would pass over it."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def bins(by_position: Tensor) -> tuple[Tensor, ...]:
    """Figures [N, S] of each position, in BINS neighbourhoods at most."""
    return by_position.tensor_split(min(BINS, by_position.shape[1]), 1)


def worst_stretch(kl: Tensor, eagers: Tensor, rounding: float) -> tuple[float, float]:
    """The mean KL and its limit in that stretch of positions where the one comes nearest to the other or is farthest beyond it.

    kl, eagers: of each token [N, S], an implementation's and eager's own.
    """
    n_stretches = min(STRETCHES, kl.shape[1])
    found = []
    for part, own in zip(kl.tensor_split(n_stretches, 1), eagers.tensor_split(n_stretches, 1), strict=True):
        error = own.std(correction=0).item() / math.sqrt(own.numel())
        limit = kl_limit(max(own.mean().item(), rounding) + LOSS_DEVIATIONS * error, floor=0)
        found.append((part.mean().item(), limit))
    return max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] / pair[1] if pair[1] else pair[0])


def continuations(lm: CausalLM, prompt: Tensor, a: Implementation, b: Implementation, n: int) -> Parting:
    """Continues prompt int64 [1, P] greedily with both, by n tokens or as many as the model has positions for, until they part."""
    n = n if lm.longest is None else min(n, lm.longest - prompt.shape[1])
    others: list[int] = []
    with tqdm(total=2 * n, desc="greedy continuation", unit="token", leave=False, delay=1) as bar:
        for token in islice(lm.continuation(b, prompt), n):
            others.append(token)
            bar.update()
        for at, token in enumerate(islice(lm.continuation(a, prompt), n)):
            bar.update()
            if token != others[at]:
                before = torch.cat((prompt, prompt.new_tensor([others[:at]])), 1)
                exact = lm.exact_logits(before)[0, -1]
                return Parting(at + 1, at, (exact.max() - exact[[token, others[at]]].min()).item())
    return Parting(n, None, 0.0)
