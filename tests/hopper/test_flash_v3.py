"""flash_v3's Gluon kernels on the simulated Hopper of tests/hopper: their mathematics, and that all wait for what they must."""

import itertools
import zlib

import pytest
import torch

from flash_ladder.kernels.flash_v3 import launch as flash_v3
from flash_ladder.kernels.flash_v3.launch import Forward
from tests.helpers.reference import MEANINGS, check, check_unrounded, documents, make_case, n_unlike, run
from tests.hopper.run import on_hopper

FP16, BF16 = torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _hopper(request, monkeypatch):
    """For each test an order of its own, and always the same."""
    on_hopper(flash_v3, monkeypatch, seed=zlib.crc32(request.node.name.encode()))


@pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "deterministic"])
@pytest.mark.parametrize("name", MEANINGS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_meanings(head_dim, name, deterministic):
    """Two heads share one of keys; more keys than queries, and neither a multiple of a tile."""
    check(make_case(1, 2, 1, 130, 150, head_dim, FP16), "flash_v3", **MEANINGS[name], deterministic=deterministic)


@pytest.mark.parametrize("head_dim", [16, 40, 80, 96, 192, 200])
@pytest.mark.parametrize("name", ["causal", "everything"])
def test_head_dims(name, head_dim):
    check(make_case(1, 2, 2, 100, 90, head_dim, BF16), "flash_v3", **MEANINGS[name])


@pytest.mark.parametrize("head_dim", [40, 128, 200, 256])
def test_float32_output(head_dim):
    """What is rounded for a half-precision output, unrounded."""
    check_unrounded(flash_v3, make_case(1, 2, 1, 200, 230, head_dim, BF16))


LENGTHS = [(1, 1), (1, 200), (200, 1), (63, 65), (64, 64), (128, 256), (129, 127), (300, 300), (65, 400), (400, 65)]


@pytest.mark.parametrize(("seq_q", "seq_k"), LENGTHS)
@pytest.mark.parametrize("name", ["full", "causal", "window", "causal window"])
def test_lengths(name, seq_q, seq_k):
    check(make_case(1, 2, 2, seq_q, seq_k, 64, FP16), "flash_v3", **MEANINGS[name])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("is_causal", [True, False])
def test_documents(is_causal, head_dim):
    ids = documents(260, (1, 70, 200), (64, 129), (259,))
    check(make_case(3, 2, 1, 260, 260, head_dim, FP16), "flash_v3", is_causal=is_causal, document_ids=ids)


@pytest.mark.parametrize("n_kv_head", [1, 3])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_many_tiles_for_a_block(head_dim, n_kv_head):
    """Rings and barriers go around, through several draws from the counter."""
    check(make_case(2, 3, n_kv_head, 260, 200, head_dim, FP16), "flash_v3", is_causal=True)


SETTINGS = [
    *(Forward(3, buffers, False, block_k) for buffers, block_k in ((2, 128), (3, 64))),
    *(Forward(2, buffers, in_registers) for buffers, in_registers in ((2, False), (3, True))),
    Forward(2, 4, False, 64),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["full", "causal", "causal window", "everything"])
def test_settings_of_the_forward(name, setting, monkeypatch):
    """Each with every meaning, whichever it was chosen for."""
    monkeypatch.setattr(flash_v3, "forward_setting", lambda inputs: setting)
    for seq_q, seq_k in ((300, 300), (130, 280)):
        check(make_case(1, 2, 1, seq_q, seq_k, 64, FP16), "flash_v3", **MEANINGS[name])


@pytest.mark.parametrize("size", [3.0, 40.0])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("is_causal", [True, False])
def test_scores_that_rise(is_causal, head_dim, size):
    """From the last keys, which are looked at first, to the first ones: the maximum has to be taken again."""
    case = make_case(1, 2, 2, 200, 520, head_dim, BF16)
    case.key.mul_(torch.linspace(size, 0.1, 520)[:, None]).copy_(case.key.to(BF16))
    check(case, "flash_v3", is_causal=is_causal)


@pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "deterministic"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_order_does_not_matter(head_dim, deterministic, monkeypatch):
    """Whoever goes first: equal bits in all but dq, and in dq too where it was asked for."""
    case = make_case(1, 4, 2, 400, 400, head_dim, FP16)
    results = []
    for seed, programs in ((0, 1), (1, 2), (2, 5), (3, 5)):
        on_hopper(flash_v3, monkeypatch, seed=seed, programs=programs)
        results.append(run(case, FP16, backend="flash_v3", deterministic=deterministic))
        assert n_unlike("flash_v3", results[0], results[-1], deterministic=deterministic) == 0
    assert deterministic == all(torch.equal(results[0][2], result[2]) for result in results)


def test_unsorted_documents_end():
    """They give wrong results, as everywhere; what they must not do here is to leave a warpgroup waiting for ever."""
    for is_causal, deterministic, moved in itertools.product((True, False), (False, True), (30, 130)):
        ids = (torch.arange(200) // 90).roll(moved)[None]
        case = make_case(1, 1, 1, 200, 200, 64, FP16)
        run(case, FP16, backend="flash_v3", is_causal=is_causal, document_ids=ids, deterministic=deterministic)
