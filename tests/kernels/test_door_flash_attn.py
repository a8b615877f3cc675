"""kernels.doors.flash_attn: flash_attn's arguments written out over float64 scores, and what is refused."""

import pytest
import torch
from transformers import modeling_flash_attention_utils as hf

from flash_ladder.kernels.doors.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from tests.helpers.reference import DEVICE, RUNGS, finest, slopes

NEAR = {torch.float64: {}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float16: {"rtol": 2e-2, "atol": 5e-3}}
BACKENDS = ["eager", *RUNGS[1:]]
HQ, HKV, D = 4, 2, 16


def dtype_of(backend):
    return torch.float64 if backend == "eager" else finest(backend)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype).requires_grad_()


def made(*shapes, dtype=torch.float64):
    """Query, key, value: of each shape [...] and number of heads, the same numbers in every dtype that holds float16's."""
    return [normal(*shape, h, D, seed=i).half().detach().to(dtype).requires_grad_() for i, (shape, h) in enumerate(shapes)]


def dense(seq_q, seq_k, batch=2, dtype=torch.float64):
    return made(((batch, seq_q), HQ), ((batch, seq_k), HKV), ((batch, seq_k), HKV), dtype=dtype)


def written_out(q, k, v, scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, s_aux=None):
    """The formulas of flash_attn's documentation: output [B, Sq, Hq, D] and log-sum-exp [B, Hq, Sq]."""
    k, v = (x.repeat_interleave(HQ // HKV, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (D**-0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    seq_q, seq_k = scores.shape[-2:]
    i, j = torch.arange(seq_q, device=DEVICE)[:, None] + seq_k - seq_q, torch.arange(seq_k, device=DEVICE)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores)[:, None, None] * (i - j).abs()
    left, right = window_size
    right = 0 if causal else right
    hidden = ((j < i - left) & (left >= 0)) | ((j > i + right) & (right >= 0))
    scores = scores.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.to(scores)[:, None, None].expand(*scores.shape[:3], 1)), -1)
    p = scores.softmax(-1).nan_to_num(0.0)[..., :seq_k]
    return torch.einsum("bhij,bjhd->bihd", p, v), scores.logsumexp(-1)


def gradients(output, inputs):
    upstream = torch.linspace(-1, 1, output.numel(), device=DEVICE, dtype=output.dtype).view(output.shape)
    return torch.autograd.grad(output, inputs, upstream)


def check(found, right, dtype):
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a.double(), b.double(), **NEAR[dtype])


ARGUMENTS = {
    "nothing": {},
    "causal": {"causal": True},
    "softmax_scale": {"softmax_scale": 0.7},
    "window_size causal": {"causal": True, "window_size": (6, 0)},
    "window_size causal by right": {"window_size": (6, 0)},
    "window_size causal, right ignored": {"causal": True, "window_size": (6, 6)},
    "window_size without left": {"window_size": (-1, 0)},
    "window_size symmetric": {"window_size": (5, 5)},
    "window_size of one": {"window_size": (0, 0)},
    "window_size as long as all": {"causal": False, "window_size": (45, 44)},
    "window_size with one long side": {"causal": True, "window_size": (400, -1)},
    "softcap": {"softcap": 1.5},
    "alibi_slopes": {"causal": True, "alibi_slopes": slopes(HQ)},
    "s_aux": {"causal": True, "s_aux": torch.tensor([-1.0, 0.5, 3.0, 0.0], device=DEVICE)},
    "deterministic": {"deterministic": True},
}
MIXED = {
    "causal": {"causal": True, "window_size": (6, 0), "alibi_slopes": slopes(HQ), "softmax_scale": 0.7},
    "symmetric": {"window_size": (5, 5), "softcap": 1.5},
}


@pytest.mark.parametrize("lengths", [(40, 40), (7, 45), (45, 30)], ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_every_argument_means_what_flash_attn_says(arguments, lengths):
    check_arguments("eager", arguments, lengths)


@pytest.mark.parametrize("lengths", [(40, 40), (45, 30)], ids=str)
@pytest.mark.parametrize("arguments", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("backend", RUNGS[1:])
def test_on_the_rungs_too(backend, arguments, lengths):
    check_arguments(backend, arguments, lengths)


def check_arguments(backend, arguments, lengths):
    dtype = dtype_of(backend)
    exact, inputs = dense(*lengths), dense(*lengths, dtype=dtype)
    meaning = {name.removeprefix("softmax_"): x for name, x in arguments.items() if name != "deterministic"}
    output, lse = written_out(*exact, **meaning)
    found, found_lse, probabilities = flash_attn_func(*inputs, **arguments, return_attn_probs=True, backend=backend)
    assert found.dtype == dtype and found_lse.dtype == torch.promote_types(dtype, torch.float32) and probabilities.numel() == 0
    check((found, found_lse, *gradients(found, inputs)), (output, lse, *gradients(output, exact)), dtype)
    assert torch.equal(flash_attn_func(*inputs, **arguments, backend=backend), found)


def test_the_order_of_the_arguments_is_flash_attns():
    q, k, v = dense(20, 20)
    found = flash_attn_func(q, k, v, 0.0, 0.7, True, (6, 0), 1.5, slopes(HQ), False, True)
    check(found[:2], written_out(q, k, v, 0.7, True, (6, 0), 1.5, slopes(HQ)), torch.float64)


# ---- sequences one after another ----

LENGTHS = {
    "alike": ((9, 0, 17, 1), (9, 0, 17, 1)),
    "unlike": ((9, 2, 17, 1), (12, 30, 5, 0)),
}


def packed(lengths_q, lengths_k, dtype=torch.float64):
    """Query, key, value in a row, and cu_seqlens of both."""
    tensors = made(((sum(lengths_q),), HQ), ((sum(lengths_k),), HKV), ((sum(lengths_k),), HKV), dtype=dtype)
    starts = [torch.tensor((0, *lengths), device=DEVICE).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    return tensors, starts


def one_by_one(q, k, v, lengths, **meaning):
    parts = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
    results = [written_out(a[None], b[None], c[None], **meaning) for a, b, c in parts]
    return torch.cat([output[0] for output, _ in results]), torch.cat([lse[0] for _, lse in results], 1)


@pytest.mark.parametrize(
    "meaning",
    [{"causal": True, "window_size": (4, 0), "alibi_slopes": slopes(HQ)}, {"window_size": (3, 3)}],
    ids=["causal", "symmetric"],
)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_see_themselves(backend, lengths, meaning):
    dtype = dtype_of(backend)
    exact, _ = packed(*lengths)
    inputs, starts = packed(*lengths, dtype=dtype)
    output, lse = one_by_one(*exact, lengths, **meaning)
    longest = [max(x) for x in lengths]
    found, found_lse, _ = flash_attn_varlen_func(*inputs, *starts, *longest, **meaning, return_attn_probs=True, backend=backend)
    check((found, found_lse, *gradients(found, inputs)), (output, lse, *gradients(output, exact)), dtype)


def test_packed_sequences_of_one_tensor_of_starts_compile_in_one_graph():
    inputs, (starts, _) = packed(*LENGTHS["alike"])
    call = torch.compile(flash_attn_varlen_func, fullgraph=True, backend="aot_eager")
    output = call(*inputs, starts, starts, 17, 17, causal=True)
    torch.testing.assert_close(output, one_by_one(*inputs, LENGTHS["alike"], causal=True)[0])


# ---- a cache ----


def cached(filled, new=0, dtype=torch.float64):
    """Query, a cache of 24 places, and new keys and values; places that are not filled hold NaN."""
    batch = len(filled)
    q, k_cache, v_cache = (x.detach() for x in dense(3, 24, batch, dtype))
    for row, n in enumerate(filled):
        k_cache[row, n:] = v_cache[row, n:] = torch.nan
    k, v = (x.detach() for x in made(((batch, new), HKV), ((batch, new), HKV), dtype=dtype))
    return q, k_cache, v_cache, k, v


@pytest.mark.parametrize("meaning", [{}, {"causal": True, "window_size": (4, 0)}], ids=["full", "window"])
@pytest.mark.parametrize("new", [0, 2])
@pytest.mark.parametrize("filled", [(20, 20), (5, 22, 0)], ids=["alike", "unlike"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_see_what_is_filled_and_new(backend, filled, new, meaning):
    dtype = dtype_of(backend)
    q, k_cache, v_cache, k, v = cached(filled, new, dtype)
    before = k_cache.clone()
    found, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, *((k, v) if new else ()), cache_seqlens=torch.tensor(filled, dtype=torch.int32, device=DEVICE),
        return_softmax_lse=True, backend=backend, **meaning,
    )  # fmt: skip
    for row, n in enumerate(filled):
        kept = slice(0, n), slice(n + new, None)
        assert all(torch.equal(k_cache[row, part].nan_to_num(7.0), before[row, part].nan_to_num(7.0)) for part in kept)
        keys, values = (torch.cat((x[row, :n], y[row]))[None].double() for x, y in ((before, k), (v_cache, v)))
        assert torch.equal(k_cache[row, n : n + new], k[row]) and torch.equal(v_cache[row, n : n + new], v[row])
        right = written_out(q[row : row + 1].double(), keys, values, **meaning)
        check((found[row : row + 1], lse[row : row + 1]), right, dtype)


@pytest.mark.parametrize("filled", [7, None])
def test_one_number_of_keys_or_all(filled):
    q, k_cache, v_cache, *_ = cached((24, 24))
    found = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=filled, causal=True)
    torch.testing.assert_close(found, written_out(q, k_cache[:, :filled], v_cache[:, :filled], causal=True)[0])


# ---- in transformers, as its FlashAttention ----


@pytest.mark.parametrize("padding", [None, 5])
def test_transformers_calls_it_as_flash_attn(monkeypatch, padding):
    """With and without padding, which transformers takes out; a window and sinks in its words."""
    for name, value in {
        "_loaded_implementation": "ours",
        "_flash_fn": flash_attn_func,
        "_flash_varlen_fn": flash_attn_varlen_func,
        "_flash_with_kvcache_fn": flash_attn_with_kvcache,
        "_pad_fn": hf._pad_input,
        "_unpad_fn": hf._unpad_input,
        "_process_flash_kwargs_fn": hf._lazy_define_process_function(flash_attn_varlen_func),
        "_process_with_kvcache_kwargs_fn": hf._lazy_define_process_function(flash_attn_with_kvcache),
    }.items():
        monkeypatch.setattr(hf, name, value)
    q, k, v = (x.detach() for x in dense(20, 20, dtype=torch.float32))
    mask, s_aux = None, torch.tensor([-1.0, 0.5, 3.0, 0.0], device=DEVICE)
    if padding:
        mask = torch.ones(2, 20, dtype=torch.int64, device=DEVICE)
        mask[0, :padding] = 0
    found = hf._flash_attention_forward(
        q, k, v, mask, 20, is_causal=True, dropout=0.0, sliding_window=6, softcap=1.5, s_aux=s_aux, implementation="ours"
    )
    for row, start in enumerate((padding or 0, 0)):
        inputs = (x[row : row + 1, start:] for x in (q, k, v))
        right = written_out(*inputs, causal=True, window_size=(5, 0), softcap=1.5, s_aux=s_aux)[0]
        torch.testing.assert_close(found[row : row + 1, start:], right, **NEAR[torch.float32])


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dropout_p": 0.1}, r"dropout_p=0\.1: attention has nothing like it"),
        ({"window_size": (4, 2)}, r"window_size=\(4, 2\): attention has causal windows"),
        ({"window_size": (4, -1)}, r"window_size=\(4, -1\)"),
        ({"window_size": (-1, 4)}, r"window_size=\(-1, 4\)"),
        ({"alibi_slopes": torch.zeros(2, HQ, device=DEVICE)}, r"alibi_slopes must be floating \[Hq\] = \[4\]"),
        ({"backend": "flash_9"}, "flash_9"),
    ],
    ids=str,
)
def test_what_attention_cannot_do_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        flash_attn_func(*dense(20, 20), **arguments)


def test_an_argument_that_is_not_flash_attns_is_refused():
    with pytest.raises(TypeError, match="q_descale"):
        flash_attn_func(*dense(20, 20), q_descale=None)
    with pytest.raises(ValueError, match=r"q, k and v must be \[B, S, H, D\], not 3D"):
        flash_attn_func(*(x[0] for x in dense(20, 20)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"block_table": torch.zeros(1)}, "block_table: attention has nothing like it"),
        ({"cu_seqlens_q": torch.tensor([0, 9.0])}, r"cu_seqlens_q must be int32 \[n \+ 1\]"),
        ({"cu_seqlens_k": torch.tensor([0, 9]).int()}, "cu_seqlens_q has 4 sequences and cu_seqlens_k 1"),
        ({"cu_seqlens_k": torch.tensor([0, 9, 9, 20, 25]).int()}, "cu_seqlens_k must rise from 0 to 27"),
    ],
    ids=["block_table", "dtype", "number", "total"],
)
def test_sequences_that_do_not_fit_are_refused(change, says):
    inputs, (starts, _) = packed(*LENGTHS["alike"])
    arguments = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 17, "max_seqlen_k": 17}
    change = {name: x.to(DEVICE) for name, x in change.items()}
    with pytest.raises(ValueError, match=says):
        flash_attn_varlen_func(*inputs, **arguments | change)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rotary_cos": torch.zeros(1)}, "rotary_cos: attention has nothing like it"),
        ({"block_table": torch.zeros(1)}, "block_table: attention"),
        ({"cache_batch_idx": torch.zeros(2)}, "cache_batch_idx: attention"),
        ({"cache_leftpad": torch.zeros(2)}, "cache_leftpad: attention"),
        ({"cache_seqlens": 25}, "cache_seqlens of 25 to 25 do not fit a cache of 24"),
        ({"cache_seqlens": 23, "new": 2}, "cache_seqlens of 23 to 23 and 2 new keys do not fit a cache of 24"),
        ({"new": 2}, "k and v need cache_seqlens"),
        ({"cache_seqlens": torch.tensor([1])}, r"cache_seqlens must be int32 \[B\] = \[2\]"),
    ],
    ids=str,
)
def test_caches_that_do_not_fit_are_refused(arguments, says):
    q, k_cache, v_cache, k, v = cached((24, 24), arguments.pop("new", 0))
    before = k_cache.clone()
    with pytest.raises(ValueError, match=says):
        flash_attn_with_kvcache(q, k_cache, v_cache, *((k, v) if k.shape[1] else ()), **arguments)
    assert torch.equal(k_cache, before)


@pytest.mark.parametrize("filled", [4, torch.tensor([3, 5, 7])], ids=["alike", "unlike"])
def test_a_cache_of_another_batch_is_refused(filled):
    q, k_cache, v_cache, *_ = cached((24, 24, 24))
    filled = filled.to(DEVICE) if isinstance(filled, torch.Tensor) else filled
    for queries, values in ((q[:2], v_cache), (torch.cat((q, q)), v_cache), (q, v_cache[:, :20])):
        with pytest.raises(ValueError, match="must have one shape, and the batch of q"):
            flash_attn_with_kvcache(queries, k_cache, values, cache_seqlens=filled)
