"""Two backends held against each other: the figures are right, rounding passes, and a wrong attention does not."""

import math

import pytest
import torch

import flash_ladder.kernels.sdpa
from flash_ladder.export.parity import Check, Difference, clear_margin, compare, kl_limit, loss_limit
from flash_ladder.kernels import eager
from flash_ladder.kernels.asked import Asked
from tests.helpers.made_up import VOCAB, sharp_model

PRECISIONS = ("32", "bf16-mixed", "16-mixed")


def windows(n: int = 6, seq_len: int = 64) -> dict[str, torch.Tensor]:
    return {"tokens": torch.randint(VOCAB, (n, seq_len + 1), generator=torch.Generator().manual_seed(1))}


def masked(sees):
    """An attention of its own mask: query i sees the keys j with sees(i, j)."""

    def attend(q, k, v, asked):
        group, seq_len = q.shape[1] // k.shape[1], q.shape[2]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        i, j = torch.arange(seq_len)[:, None], torch.arange(seq_len)
        scores = ((q @ k.transpose(-1, -2)).float() * asked.scale).masked_fill(~sees(i, j), -torch.inf)
        return torch.softmax(scores, -1).to(v.dtype) @ v, None

    return attend


def rescaled(factor):
    return lambda q, k, v, asked: eager.attend(q, k, v, Asked(asked.scale * factor, is_causal=True))


def poisoned(q, k, v, asked):
    return torch.full_like(q, torch.nan), None


WRONG = {
    "sees one later key": masked(lambda i, j: j <= i + 1),
    "misses the key of its own position": masked(lambda i, j: (j < i) | (j + i == 0)),
    "no scale": rescaled(math.sqrt(16)),
    "drops the second tile of 16 keys for half of the queries": masked(lambda i, j: (j <= i) & ~((j // 16 == 1) & (i >= 32))),
    "drops the last tile of keys": masked(lambda i, j: (j <= i) & ((j < 48) | (i < 48) | (i == j))),
    "not causal": masked(lambda i, j: i + j >= 0),
    "the wrong head": lambda q, k, v, asked: eager.attend(q.flip(1), k, v, Asked(asked.scale, is_causal=True)),
    "nan": poisoned,
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_attention_is_beyond_tolerance(monkeypatch, wrong, precision):
    monkeypatch.setattr(flash_ladder.kernels.sdpa, "attend", WRONG[wrong])
    parity = compare(sharp_model(), windows(), backend="sdpa", precision=precision)
    assert not parity.within
    assert not parity.checks()[1].within  # the mean KL alone


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pair", [("sdpa", "eager"), ("eager", "sdpa"), ("eager", "eager")])
def test_rounding_is_within_tolerance(pair, precision):
    backend, against = pair
    parity = compare(sharp_model(), windows(), backend=backend, against=against, precision=precision)
    assert parity.within, parity.checks()
    assert (parity.rounding > 0) == (precision != "32")
    assert (parity.candidate.backend, parity.against.backend) == pair
    if backend == against:
        assert parity.mean_kl == parity.max_logit_difference == 0 and parity.greedy_agreement == 1


def test_flash_is_within_tolerance():
    parity = compare(sharp_model(), windows(2, 40), backend="flash_v2", precision="32")
    assert parity.within, parity.checks()
    assert parity.mean_kl > 0


@pytest.mark.parametrize("chunk", [2**24, VOCAB * 5])
@torch.no_grad()
def test_the_figures_are_what_they_say(monkeypatch, chunk):
    monkeypatch.setattr("flash_ladder.model.loss.CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(flash_ladder.kernels.sdpa, "attend", rescaled(1.5))
    model, data = sharp_model(), windows()
    parity = compare(model, data, backend="sdpa", batch_size=4)

    tokens, logits = data["tokens"], {}
    for backend in ("eager", "sdpa"):
        model.backend = backend
        logits[backend] = model(tokens[:, :-1]).double()
    p, q = (logits[b].log_softmax(-1) for b in ("eager", "sdpa"))
    difference = (logits["eager"] - logits["sdpa"]).abs()
    same = logits["eager"].argmax(-1) == logits["sdpa"].argmax(-1)
    best = logits["eager"].topk(2).values
    clear = best[..., 0] - best[..., 1] >= 16 * math.sqrt(2e-8)
    assert parity.mean_kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    assert parity.mean_logit_difference == pytest.approx(difference.mean().item(), rel=1e-5)
    assert parity.max_logit_difference == pytest.approx(difference.max().item(), rel=1e-5)
    assert parity.greedy_agreement == pytest.approx(same.double().mean().item())
    assert parity.clear_greedy_agreement == pytest.approx(same[clear].double().mean().item())
    assert parity.against.loss == pytest.approx(-p.gather(-1, tokens[:, 1:, None]).mean().item(), abs=1e-6)
    assert parity.candidate.loss == pytest.approx(-q.gather(-1, tokens[:, 1:, None]).mean().item(), abs=1e-6)


@torch.no_grad()
def test_rounding_is_eager_against_itself_in_float32():
    model, data = sharp_model(), windows()
    tokens = data["tokens"][:, :-1]
    model.backend = "eager"
    exact = model(tokens).double().log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(tokens).double().log_softmax(-1)
    expected = (exact.exp() * (exact - rounded)).sum(-1).mean().item()
    for pair in ({"backend": "sdpa"}, {"backend": "eager", "against": "sdpa"}):
        assert compare(model, data, precision="bf16-mixed", **pair).rounding == pytest.approx(expected, rel=1e-4)


def test_limits():
    assert kl_limit(0) == 1e-8 and kl_limit(1e-4) == pytest.approx(3e-4, rel=1e-3)
    assert kl_limit(1e-12, floor=0) == pytest.approx(3e-12) and loss_limit(0, 9, floor=0) == 0
    assert clear_margin(1e-4, floor=0) == pytest.approx(16 * math.sqrt(6e-4))
    assert loss_limit(1e-4, 10**4) == pytest.approx(3e-4 + 5 * math.sqrt(6e-4 / 10**4), rel=1e-3)
    assert Check("x", 1.0, 1.0).within and not Check("x", 1.1, 1.0).within and Check("x", 9.0).within
    assert not Check("x", math.nan, 1.0).within and not Check("x", math.nan, 0.5, is_share=True).within
    assert Check("x", 0.9991, 0.999, is_share=True).within and not Check("x", 0.9989, 0.999, is_share=True).within


@pytest.mark.parametrize(
    ("check", "share"),
    [
        (Check("x", 2.0, 4.0), 0.5),
        (Check("x", 0.998, 0.999, is_share=True), 2.0),
        (Check("x", 1.0, 0.999, is_share=True), 0.0),
        (Check("x", math.nan, 1.0), math.inf),
        (Check("x", 1.0, 0.0), math.inf),
        (Check("x", 0.0, 0.0), 0.0),
    ],
)
def test_the_share_of_a_limit(check, share):
    assert check.share_of_limit == pytest.approx(share)
    assert check.within == (share <= 1)


def test_float64_logits_are_compared_in_float64():
    """float32 would lose a difference of 1e-9 altogether."""
    logits = torch.randn(2, 8, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = logits + 1e-9 * torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    apart = Difference()
    for rows in (slice(0, 1), slice(1, 2)):
        apart.add(logits[rows], other[rows])
    p, d = logits.softmax(-1), logits - other
    d = d - (p * d).sum(-1, keepdim=True)
    expected = (p * d * d).sum(-1).flatten() / 2  # to second order
    torch.testing.assert_close(apart.token_kl, expected, rtol=1e-5, atol=0)
    assert apart.mean_kl == pytest.approx(expected.mean().item(), rel=1e-5)
    assert apart.max_difference == pytest.approx((logits - other).abs().max().item())
