"""The certificate: what is right passes, deliberately wrong attention does not, and the figures are what they say."""

import math
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from flash_ladder.certify.causal_lm import Implementation, implementation
from flash_ladder.certify.certificate import certify, worst_stretch
from flash_ladder.errors import UserError
from tests.helpers.tiny_hf import VOCAB, WRONG, attend, causal_lm

WINDOWS = torch.randint(VOCAB, (4, 65), generator=torch.Generator().manual_seed(0))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def certified(lm, a, n_continued=0, b="eager"):
    return certify(lm, WINDOWS, implementation("a", a, lm.model), implementation("b", b, lm.model), n_continued)


def beyond(found):
    return {check.name.partition(": ")[2] for check in found.checks() if not check.within}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("pair", [("auto", "eager"), ("eager", "sdpa"), ("auto", "sdpa")], ids="-".join)
def test_what_is_right_is_certified(family, dtype, pair):
    found = certified(causal_lm(family, dtype), pair[0], 40, b=pair[1])
    assert found.within, found.checks()
    assert {"eager", found.a, found.b} == set(found.runs) and found.rounding > 0
    assert not any(check.name.startswith("eager: ") for check in found.checks())  # it is the measure


def test_a_mixture_of_experts_with_sinks_and_windows_is_certified():
    """transformers has no sdpa of its own for this one."""
    found = certified(causal_lm("gpt_oss"), "auto")
    assert found.within and found.mean_kl > 0, found.checks()


def test_a_rung_is_certified():
    found = certified(causal_lm("llama"), "flash_v2", 3)
    assert found.within, found.checks()
    assert found.a == "flash_v2" and 0 < found.mean_kl < 1e-9


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_wrong_attention_is_not(family, wrong):
    found = certified(causal_lm(family), wrong)
    assert {"mean KL to float64", "mean KL to float64, worst eighth", "mean KL"} <= beyond(found)
    assert min(found.mean_kl, found.runs[wrong].mean_kl) > 1e6 * found.rounding


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("wrong", [name for name in WRONG if "scale" not in name])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_wrong_mask_is_seen_through_the_rounding_of_16_bits(family, wrong, dtype):
    found = certified(causal_lm(family, dtype), wrong)
    assert {"mean KL to float64", "mean KL to float64, worst eighth", "mean KL"} <= beyond(found)


def test_a_fault_in_one_place_is_seen_in_its_eighth_alone():
    found = certified(causal_lm("gpt2", torch.bfloat16, std=0.1), "drops_the_last_tile")
    assert beyond(found) == {"mean KL to float64, worst eighth"}
    assert not found.within


def test_a_fault_of_the_cache_alone_is_seen_where_the_continuations_part():
    right = attend(lambda i, j: j <= i)
    forgets = attend(lambda i, j: (j <= i) & (j >= 12))
    hf.AttentionInterface.register(
        "wrong_behind_a_cache",
        lambda module, query, *others, **named: (forgets if query.shape[2] == 1 else right)(module, query, *others, **named),
    )
    lm = causal_lm("llama")
    found = certified(lm, "wrong_behind_a_cache", 40)
    assert beyond(found) == {"greedy parting"}
    at = found.parting.at
    eager, wrong = (
        list(islice(lm.continuation(Implementation(name, name), WINDOWS[:1, :32]), at + 1))
        for name in ("eager", "wrong_behind_a_cache")
    )
    assert eager[:at] == wrong[:at] and eager[at] != wrong[at]
    exact = lm.exact_logits(torch.cat((WINDOWS[:1, :32], torch.tensor([eager[:at]], dtype=torch.int64)), 1))[0, -1]
    assert exact.argmax() == eager[at]
    assert found.parting.gap == pytest.approx((exact[eager[at]] - exact[wrong[at]]).item())


def test_a_continuation_ends_with_the_positions_of_the_model():
    assert certified(causal_lm("gpt2"), "sdpa", 1000).parting.n_tokens == 128 - 32


# ---- the figures ----


@torch.no_grad()
def test_the_figures_are_what_they_say():
    lm, name = causal_lm("llama"), "drops_a_tile"
    found, tokens = certified(lm, name), WINDOWS[:, :-1]
    logits = {}
    for one in ("eager", name):
        lm.model.set_attn_implementation(one)
        logits[one] = lm.model(tokens).logits.double()
    logits["float64"] = lm.exact_logits(tokens)
    p, q, r = (logits[one].log_softmax(-1) for one in ("float64", name, "eager"))
    kl = (p.exp() * (p - q)).sum(-1)
    apart = (logits["float64"] - logits[name]).abs()
    run = found.runs[name]
    assert (found.n_windows, found.seq_len) == (4, 64)
    assert run.mean_kl == pytest.approx(kl.mean().item(), rel=1e-6)
    assert run.kl_by_position == pytest.approx(kl.mean(0).tolist(), rel=1e-6) and found.positions == list(range(1, 65))
    assert (run.max_logit_difference, run.mean_logit_difference) == pytest.approx(
        (apart.max().item(), apart.mean().item()), rel=1e-6
    )
    assert run.agreement == (logits["float64"].argmax(-1) == logits[name].argmax(-1)).double().mean().item()
    assert found.mean_kl == pytest.approx((r.exp() * (r - q)).sum(-1).mean().item(), rel=1e-4)
    for loss, one in ((found.exact_loss, "float64"), (run.loss, name), (found.runs["eager"].loss, "eager")):
        assert loss == pytest.approx(F.cross_entropy(logits[one].flatten(0, 1), WINDOWS[:, 1:].flatten()).item(), rel=1e-6)


def test_noise_is_a_part_of_rounding(monkeypatch):
    """Eager that gives something else in a batch of two, as a GPU's matrix products may."""
    lm = causal_lm("llama")
    right = lm.logits

    def noisy(one, tokens):
        logits = right(one, tokens)
        return logits + 1e-3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)) if len(tokens) == 2 else logits

    quiet = certified(lm, "sdpa")
    monkeypatch.setattr(lm, "logits", noisy)
    found = certified(lm, "sdpa")
    assert found.noise > 1e3 * quiet.rounding and found.rounding == found.noise
    assert quiet.rounding >= quiet.runs["eager"].mean_kl


def test_the_worst_eighth_is_the_one_nearest_to_its_limit():
    eager = torch.full((3, 80), 1e-6, dtype=torch.float64)
    eager[:, 70:] = 4e-6  # eager itself is less exact there
    found = eager.clone()
    found[:, 20:30] = 2e-6
    assert worst_stretch(found, eager, 1e-6) == pytest.approx((2e-6, 3e-6))
    assert worst_stretch(found, eager, 4e-6) == pytest.approx((4e-6, 12e-6))
    spread = eager.clone()
    spread[0, 20:30] = 3e-6  # where tokens differ, their mean is less certain
    found[:, 20:30] = 5e-6
    value, limit = worst_stretch(found, spread, 1e-6)
    own = spread[:, 20:30].flatten()
    assert value == pytest.approx(5e-6) and limit == pytest.approx(3 * (own.mean() + 5 * own.std(correction=0) / 30**0.5).item())
    found[1, 3] = math.nan
    assert math.isnan(worst_stretch(found, eager, 1e-6)[0])


def test_float64_is_float64_throughout():
    """Norms, rotary angles and softmax in float32, as the model writes them, would be off by 1e-6."""
    lm = causal_lm("llama")
    tokens = WINDOWS[:, :-1]
    exact = lm.exact_logits(tokens)
    lm.exact_model.set_attn_implementation("sdpa")
    assert exact.dtype == torch.float64
    torch.testing.assert_close(lm.exact_logits(tokens), exact, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert (lm.exact_model(tokens).logits - exact).abs().max() > 1e-8


# ---- what cannot be ----


def test_nan_is_not_certified():
    hf.AttentionInterface.register("nan", lambda module, query, *others, **named: (query.transpose(1, 2) * torch.nan, None))
    found = certified(causal_lm("llama"), "nan", 4)
    assert {"mean KL to float64", "mean KL to float64, worst eighth", "mean KL", "|Δ loss|"} <= beyond(found)


def test_eager_must_be_finite():
    lm = causal_lm("llama")
    with torch.no_grad():
        lm.model.lm_head.weight[0] = torch.inf
    with pytest.raises(UserError, match=r"eager attention gives logits that are not finite in torch\.float32"):
        certified(lm, "sdpa")
