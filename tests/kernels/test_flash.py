"""The flash rungs against float64, judged by what eager attention loses in the same precision: output, lse and three gradients.

Without a GPU the kernels run in Triton's interpreter, tile by tile (64 queries by 32 keys forward and in dq, 32 by 64 in dk and
dv), so sizes here stay small and cross every tile boundary that matters. The axes: head_dim, dtype, lengths, heads that share keys,
meanings, documents, ranges of values, seeds. What is not about a dtype is tested in float32, and on flash_v3, which runs on Hopper
alone, in float16.
"""

import itertools

import pytest
import torch

from flash_ladder.kernels import attention
from tests.helpers.reference import (
    DEVICE,
    MEANINGS,
    RUNGS,
    check,
    documents,
    errors,
    finest,
    make_case,
    n_unlike,
    run,
    skip_unless_runs,
    slopes,
)

pytestmark = [pytest.mark.filterwarnings("ignore:flash_v"), pytest.mark.parametrize("rung", RUNGS)]

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


# ---- sizes ----


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(FP16, d) for d in (16, 40, 59, 80, 111, 256)] + [(BF16, d) for d in (40, 128)] + [(FP32, d) for d in (40, 96, 128, 256)],
    ids=str,
)
def test_head_dims(rung, dtype, head_dim):
    check(make_case(1, 1, 1, 70, 70, head_dim, dtype), rung, is_causal=True)


LENGTHS = [(1, 100), (31, 31), (32, 32), (33, 33), (65, 65), (128, 128), (63, 129), (130, 40), (64, 31)]


@pytest.mark.parametrize(
    ("seq_q", "seq_k", "is_causal"), [(*x, True) for x in LENGTHS] + [(*x, False) for x in LENGTHS if x[0] in (1, 33, 63, 130)]
)
def test_lengths(rung, seq_q, seq_k, is_causal):
    check(make_case(1, 1, 1, seq_q, seq_k, 32, finest(rung)), rung, is_causal=is_causal)


@pytest.mark.parametrize(("n_head", "n_kv_head"), [(2, 2), (6, 2), (3, 1)])
def test_grouped_heads(rung, n_head, n_kv_head):
    check(make_case(2, n_head, n_kv_head, 40, 40, 16, finest(rung)), rung, is_causal=True)


@pytest.mark.parametrize("seed", range(5))
def test_seeds(rung, seed):
    check(make_case(1, 2, 1, 97, 97, 48, FP16, seed=seed), rung, is_causal=True)


# ---- meanings ----

# Rows that see one key have a test of their own: against eager attention, which loses nothing there, rounding has no measure.
JUDGED = [name for name in MEANINGS if "of one" not in name and name != "causal"]


@pytest.mark.parametrize("name", JUDGED)
def test_meanings(rung, name):
    """Every argument of attention, two query heads on one key/value head, more keys than queries."""
    check(make_case(1, 2, 1, 70, 100, 24, finest(rung)), rung, **MEANINGS[name])


@pytest.mark.parametrize("name", ["window", "causal window", "full alibi", "everything"])
def test_meanings_with_fewer_keys_than_queries(rung, name):
    """Windows that begin before the first key, distances to keys that are not there."""
    check(make_case(1, 2, 1, 100, 70, 24, finest(rung)), rung, **MEANINGS[name])


@pytest.mark.parametrize("name", ["causal window", "everything"])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_meanings_in_half_precision(rung, name, dtype):
    check(make_case(1, 2, 1, 100, 100, 40, dtype), rung, **MEANINGS[name])


@pytest.mark.parametrize(
    ("window_size", "is_causal"), [(2, False), (31, True), (32, False), (33, True), (64, True), (65, False), (97, True)]
)
def test_windows_around_a_tile(rung, window_size, is_causal):
    check(make_case(1, 1, 1, 130, 130, 16, finest(rung)), rung, is_causal=is_causal, window_size=window_size)


# Where documents start, for each of two batch entries, in 130 positions: tiles begin at multiples of 32 and 64.
CUTS = {
    "one document": ((), ()),
    "off the tiles": ((1, 40, 100, 129), (70,)),
    "on the tiles": ((32, 64), (64, 96, 128)),
    "of one token": (tuple(range(50, 70)), (63, 64, 65)),
    "inside a tile": ((33, 36, 40, 60), (97, 99, 110)),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("cuts", CUTS)
def test_documents(rung, cuts, is_causal):
    case = make_case(2, 1, 1, 130, 130, 16, finest(rung))
    check(case, rung, is_causal=is_causal, document_ids=documents(130, *CUTS[cuts]))


@pytest.mark.parametrize("is_causal", [False, True])
def test_documents_with_everything(rung, is_causal):
    """Four heads on two, each with its slope; two batch entries, each with its documents."""
    more = {"window_size": 25, "softcap": 2.0, "alibi_slopes": slopes(4), "scale": -0.3}
    case = make_case(2, 4, 2, 80, 80, 16, finest(rung))
    check(case, rung, is_causal=is_causal, document_ids=documents(80, (40, 65), (10, 11, 75)), **more)


def test_documents_are_sequences_of_their_own(rung):
    """Packed or apart, a document's results are the same to rounding."""
    ends, dtype = (0, 33, 75, 100), finest(rung)
    case = make_case(1, 2, 1, 100, 100, 32, dtype)
    skip_unless_runs(rung, dtype, 32)
    limits = {"atol": 2e-5, "rtol": 1e-5} if dtype == FP32 else {"atol": 4e-3, "rtol": 2e-3}
    packed = run(case, dtype, backend=rung, is_causal=True, document_ids=documents(100, ends[1:-1]))
    for start, end in itertools.pairwise(ends):
        tensors = (case.query, case.key, case.value, case.grad_output, case.grad_lse)
        alone = run(type(case)(*(x[:, :, start:end] for x in tensors), dtype), dtype, backend=rung, is_causal=True)
        for a, b in zip(packed, alone, strict=True):
            torch.testing.assert_close(a[:, :, start:end], b, **limits)


# ---- rows of one key and of none ----


@pytest.mark.parametrize("seen", ["one key there is", "a window of one", "a causal window of one", "documents of one token"])
def test_rows_of_one_key(rung, seen):
    """There p is 1 and only the gradient of lse reaches query and key; dp and delta cancel to rounding."""
    seq = 1 if seen == "one key there is" else 70
    meaning = {
        "one key there is": {},
        "a window of one": {"window_size": 1},
        "a causal window of one": {"window_size": 1, "is_causal": True},
        "documents of one token": {"document_ids": documents(seq, range(1, seq))},
    }[seen]
    dtype = finest(rung)
    case = make_case(1, 2, 2, seq, seq, 32, dtype)
    skip_unless_runs(rung, dtype, 32, **meaning)
    output, lse, dq, dk, dv = run(case, dtype, backend=rung, scale=0.5, **meaning)
    weight = 0.5 * case.grad_lse[..., None]
    expected = (case.value, 0.5 * (case.query * case.key).sum(-1), weight * case.key, weight * case.query, case.grad_output)
    limit = 1e-5 if dtype == FP32 else 2e-3
    for a, b in zip((output, lse, dq, dk, dv), expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=limit, rtol=limit)


def test_rows_that_see_nothing(rung):
    """The first 36 queries stand before the first key: output 0, lse -inf, no gradient, and nothing else disturbed."""
    dtype = finest(rung)
    skip_unless_runs(rung, dtype, 32)
    output, lse, dq, dk, dv = run(make_case(1, 1, 1, 100, 64, 32, dtype), dtype, backend=rung, is_causal=True)
    assert (output[:, :, :36] == 0).all() and (lse[:, :, :36] == -torch.inf).all() and (dq[:, :, :36] == 0).all()
    assert lse[:, :, 36:].isfinite().all() and dk.isfinite().all() and dv.isfinite().all()


def test_no_row_sees_anything(rung):
    """A window over 64 positions that stand before the only key."""
    dtype = finest(rung)
    skip_unless_runs(rung, dtype, 32)
    case = make_case(1, 1, 1, 65, 1, 32, dtype)
    output, lse, *grads = run(case, dtype, backend=rung, window_size=3)
    assert (output[:, :, :62] == 0).all() and (lse[:, :, :62] == -torch.inf).all() and (grads[0][:, :, :62] == 0).all()
    assert all(g.isfinite().all() for g in grads) and lse[:, :, 62:].isfinite().all()


# ---- values ----


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("size", [0.0, 5.0, 20.0], ids=["constant", "large logits", "one-hot rows"])
def test_ranges(rung, size, dtype):
    check(make_case(1, 1, 1, 80, 80, 32, dtype, size=size), rung, is_causal=True)


@pytest.mark.parametrize("size", [0.01, 20.0], ids=["tiny logits", "large logits"])
def test_softcap_at_both_ends(rung, size):
    """Where tanh is the identity, and where it is 1 and its derivative nothing."""
    check(make_case(1, 1, 1, 80, 80, 32, finest(rung), size=size), rung, is_causal=True, softcap=5.0)


def test_large_logits_in_float32(rung):
    """The backward recomputes p = exp(s - lse): what float32 loses on lse itself, p inherits, and no more than a few times that."""
    skip_unless_runs(rung, FP32, 32)
    case = make_case(1, 1, 1, 80, 80, 32, FP32, size=20.0)
    exact = run(case, torch.float64, backend="eager", is_causal=True)
    found = errors(run(case, FP32, backend=rung, is_causal=True), exact)
    rounding = torch.finfo(FP32).eps * exact[1].abs().max().item()
    assert max(found[name].rms for name in ("dq", "dk", "dv")) < 2 * rounding and found["output"].rms < rounding


def test_an_outlier_in_every_tensor(rung):
    case = make_case(1, 1, 1, 80, 80, 32, BF16)
    case.query[0, 0, 40, 3] = case.key[0, 0, 17, 3] = 60.0
    case.value[0, 0, 9] *= 100
    check(case, rung, is_causal=True)


def test_constant_values(rung):
    """Equal keys, equal values: the average of equal things."""
    skip_unless_runs(rung, FP16, 32)
    query, key, value = (torch.full((1, 1, 70, 32), x, dtype=FP16, device=DEVICE) for x in (0.5, -2.0, 3.0))
    output, lse = attention(query, key, value, is_causal=True, return_lse=True, backend=rung)
    assert (output == 3.0).all()
    expected = -32 / 32**0.5 + torch.arange(1, 71, device=DEVICE).log()
    torch.testing.assert_close(lse[0, 0], expected, atol=1e-5, rtol=1e-5)


# ---- gradients, without eager attention ----


@pytest.mark.parametrize("name", ["causal", "everything"])
def test_finite_differences(rung, name):
    """Through output and log-sum-exp, along random directions, by central differences of what the rung itself computes."""
    skip_unless_runs(rung, FP32, 16, **MEANINGS[name])
    case = make_case(1, 2, 1, 40, 70, 16, FP32)

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        output, lse = attention(*inputs, return_lse=True, backend=rung, **MEANINGS[name])
        return (output.double() * case.grad_output).sum() + (lse.double() * case.grad_lse).sum()

    inputs = [x.requires_grad_() for x in case.inputs(FP32)]
    grads = torch.autograd.grad(loss(*inputs), inputs)
    inputs = [x.detach() for x in inputs]
    for i, (x, grad) in enumerate(zip(inputs, grads, strict=True)):
        direction = make_case(1, 2, 1, 40, 70, 16, FP32, seed=9).inputs(FP32)[i]
        step = 2.0**-7
        there, back = ([*inputs[:i], x + sign * step * direction, *inputs[i + 1 :]] for sign in (1, -1))
        slope = (loss(*there) - loss(*back)) / (2 * step)
        expected = (grad.double() * direction.double()).sum()
        size = grad.double().norm() * direction.double().norm()
        assert (slope - expected).abs() < 1e-3 * size, (i, slope.item(), expected.item())


# ---- the same every time ----


def test_same_bits_every_time(rung):
    skip_unless_runs(rung, FP16, 32)
    case = make_case(1, 2, 1, 90, 90, 32, FP16)
    first = run(case, FP16, backend=rung, is_causal=True)
    for _ in range(2):
        assert n_unlike(rung, first, run(case, FP16, backend=rung, is_causal=True)) == 0


def test_a_batch_changes_nothing(rung):
    """A sequence gives the same bits alone and inside a batch."""
    skip_unless_runs(rung, FP16, 32)
    inputs = [torch.randn(3, 2, 50, 32, device=DEVICE, dtype=FP16) for _ in range(3)]
    together = attention(*inputs, is_causal=True, backend=rung)
    alone = attention(*(x[1:2] for x in inputs), is_causal=True, backend=rung)
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize(("seq_q", "meaning"), [(130, {"window_size": 5}), (200, {})], ids=["window", "blind rows"])
def test_a_scale_that_takes_scores_far_out(rung, seq_q, meaning):
    """Rows whose first tile is hidden start from a maximum below any score, which must stay finite in the scaled units."""
    dtype = finest(rung)
    skip_unless_runs(rung, dtype, 16, **meaning)
    case = make_case(1, 1, 1, seq_q, 130, 16, dtype, size=0.05)
    results = run(case, dtype, backend=rung, is_causal=True, scale=300.0, **meaning)
    exact = run(case, torch.float64, backend="eager", is_causal=True, scale=300.0, **meaning)
    assert not any(x.isnan().any() for x in results)
    limit = 1e-3 if dtype == FP32 else 4e-3
    torch.testing.assert_close(results[0].double(), exact[0], atol=limit, rtol=limit)
