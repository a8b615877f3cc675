"""sinks: a score a head that takes probability and has no value, against float64 and against transformers' GPT-OSS."""

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from flash_ladder.kernels import attention
from flash_ladder.kernels.asked import Asked
from flash_ladder.kernels.bounds import key_bounds, visible
from tests.helpers.reference import DEVICE, RUNGS, documents, finest

MEANINGS = {
    "causal": {"is_causal": True},
    "full": {},
    "window": {"is_causal": True, "window_size": 7},
    "documents": {"is_causal": True, "document_ids": documents(40, (9, 23), (17,))},
}


def made(seq_q=40, seq_k=40, dtype=torch.float64, seed=0):
    """Query, key, value of two query heads a key/value head, and sinks as large as the rows' scores together."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, s, 64, generator=generator) for h, s in ((4, seq_q), (2, seq_k), (2, seq_k)))
    sinks = torch.tensor([-3.0, 0.5, 2.0, 6.0])
    return [x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v, sinks)]


def reference(q, k, v, sinks, **meaning):
    """The softmax written out over the keys and the sink."""
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    seen = visible(*key_bounds(Asked(1.0, **meaning), q.shape[2], k.shape[2], q.device), k.shape[2])
    scores = scores.masked_fill(~seen, -torch.inf)
    scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:3], 1)), -1)
    return scores.softmax(-1)[..., :-1] @ v, scores.logsumexp(-1)


def gradients(results, inputs):
    output, lse = results
    weights = torch.linspace(-1, 1, output.numel(), device=DEVICE, dtype=output.dtype).view(output.shape)
    return torch.autograd.grad(((output * weights).double().sum() + (lse.double() * lse.double().cos()).sum()), inputs)


@pytest.mark.parametrize("meaning", MEANINGS.values(), ids=MEANINGS)
@pytest.mark.parametrize("backend", ["eager", *RUNGS])
def test_a_sink_is_one_more_key_without_a_value(backend, meaning):
    dtype = torch.float64 if backend == "eager" else finest(backend)
    exact, inputs = made(), made(dtype=dtype)
    right = reference(*exact, **meaning)
    found = attention(*inputs[:3], sinks=inputs[3], return_lse=True, backend=backend, **meaning)
    near = {"rtol": 2e-2, "atol": 5e-3} if dtype == torch.float16 else {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip((*found, *gradients(found, inputs)), (*right, *gradients(right, exact)), strict=True):
        torch.testing.assert_close(a.double(), b.double(), **near)


@pytest.mark.parametrize("backend", ["eager", "flash_v2"])
def test_it_is_gpt_osss(backend):
    inputs = made(dtype=torch.float32)
    q, k, v, sinks = inputs
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks, module.training = 2, sinks, False
    mask = torch.full((40, 40), -torch.inf, device=DEVICE).triu(1)[None, None]
    right = eager_attention_forward(module, q, k, v, mask, scaling=64**-0.5)[0].transpose(1, 2)
    found = attention(q, k, v, is_causal=True, sinks=sinks, backend=backend)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(right)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(right, inputs, upstream), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("backend", ["eager", *RUNGS])
def test_a_row_that_sees_no_key_gives_all_to_its_sink(backend):
    inputs = made(seq_q=30, seq_k=20, dtype=finest(backend))
    output, lse = attention(*inputs[:3], sinks=inputs[3], is_causal=True, return_lse=True, backend=backend)
    assert (output[:, :, :10] == 0).all() and torch.equal(lse[0, :, :10], inputs[3].to(lse.dtype)[:, None].expand(4, 10))
    assert all(g.isfinite().all() for g in gradients((output, lse), inputs))


@pytest.mark.parametrize("backend", ["eager", "flash_v2"])
def test_it_compiles_in_one_graph(backend):
    inputs = made(dtype=torch.float32)

    def call(q, k, v, sinks):
        return attention(q, k, v, sinks=sinks, is_causal=True, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), call(*inputs))


@pytest.mark.parametrize(
    ("sinks", "says"),
    [(torch.zeros(2), r"sinks must be floating \[Hq\] = \[4\]"), (torch.zeros(4).int(), "not torch.int32")],
    ids=["heads", "dtype"],
)
def test_other_sinks_are_refused(sinks, says):
    with pytest.raises(ValueError, match=says):
        attention(*made()[:3], sinks=sinks.to(DEVICE))


def test_sdpa_refuses_them():
    with pytest.raises(ValueError, match=r"F\.scaled_dot_product_attention has no return_lse; .*eager"):
        attention(*made()[:3], sinks=made()[3], backend="sdpa")
