"""The Triton rungs on the GPU: real tiles, every generation's, long sequences, half precision, the values that hurt.

test_attention_again.py, test_flash_again.py and test_flash_memory_again.py run those of tests/ here too; test_flash_limits.py has
what is large, concurrent or captured.
"""

import pytest
import torch

from kernels import choose, tiles
from kernels.attention import BACKENDS
from tests.reference import MEANINGS, RUNGS, check, documents, make_case, slopes

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
each_rung = pytest.mark.parametrize("rung", RUNGS)


@each_rung
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("head_dim", [16, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 256])
def test_head_dims(rung, head_dim, is_causal):
    check(make_case(1, 4, 2, 700, 700, head_dim, BF16), rung, is_causal=is_causal)


@each_rung
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize(
    ("seq_q", "seq_k"), [(1, 1), (1, 4096), (127, 129), (1023, 1023), (1025, 1025), (2048, 2048), (777, 1500), (1500, 777)]
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lengths(rung, seq_q, seq_k, head_dim, dtype):
    case = make_case(1, 2, 1, seq_q, seq_k, head_dim, dtype)
    if seq_k == 1:  # one key: the true gradients of query and key are those of lse alone
        case.grad_lse[:] = 10.0
    check(case, rung, is_causal=True)


@each_rung
@pytest.mark.parametrize("seed", range(5))
def test_seeds(rung, seed):
    check(make_case(2, 8, 2, 1000, 1000, 128, BF16, seed=seed), rung, is_causal=True)


@each_rung
@pytest.mark.parametrize("size", [0.0, 5.0, 20.0])
def test_large_logits(rung, size):
    check(make_case(1, 2, 2, 500, 500, 64, BF16, size=size), rung, is_causal=True)


@each_rung
def test_float32(rung):
    check(make_case(1, 2, 1, 300, 300, 64, FP32), rung, is_causal=True)


# ---- meanings, over several of a GPU's tiles ----

WINDOWS = {"window": 257, "causal window": 300, "everything": 200}


@each_rung
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", [name for name in MEANINGS if "of one" not in name])
def test_meanings(rung, name, head_dim):
    meaning = MEANINGS[name] | ({"window_size": WINDOWS[name]} if name in WINDOWS else {})
    check(make_case(1, 2, 1, 700, 900, head_dim, BF16), rung, **meaning)


@each_rung
@pytest.mark.parametrize("name", ["window", "everything"])
def test_meanings_with_fewer_keys_than_queries(rung, name):
    check(make_case(1, 2, 1, 900, 700, 64, FP16), rung, **MEANINGS[name] | {"window_size": WINDOWS[name]})


@each_rung
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("cuts", [((1, 400, 401, 640), (128, 256, 899)), (range(1, 900, 7), ())], ids=["long and short", "short"])
def test_documents(rung, cuts, is_causal):
    check(make_case(2, 2, 1, 900, 900, 64, BF16), rung, is_causal=is_causal, document_ids=documents(900, *cuts))


@each_rung
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_everything_with_documents(rung, dtype):
    meaning = {"window_size": 150, "softcap": 2.0, "alibi_slopes": slopes(4), "document_ids": documents(500, (300,), (90, 91))}
    check(make_case(2, 4, 2, 500, 500, 64, dtype), rung, is_causal=True, **meaning)


# ---- the tiles of every generation ----


@pytest.mark.parametrize("meaning", ["causal", "everything"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("table", ["HOPPER", "LARGE", "SMALL", "TURING"])
def test_tiles_of_every_generation(monkeypatch, table, head_dim, meaning):
    """flash_v2 with the tiles it takes on other GPUs. flash_v1 has the same ones everywhere."""
    chosen = getattr(tiles, table)[head_dim]
    monkeypatch.setattr(BACKENDS["flash_v2"], "tiles", lambda *a: chosen)
    asked = MEANINGS[meaning] | ({"window_size": 200} if meaning == "everything" else {})
    check(make_case(1, 2, 1, 300, 400, head_dim, FP16), "flash_v2", **asked)


def test_auto_takes_a_rung_from_ampere_on():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("for Ampere and newer")
    assert choose(torch.device("cuda"), BF16, 64).backend in RUNGS
