"""The flash rungs on the GPU: real tiles, every generation's, long sequences, half precision, the values that hurt.

test_attention_again.py, test_flash_again.py and test_flash_memory_again.py run those of tests/ here too; test_flash_limits.py has
what is large, concurrent or captured, test_flash_v3.py what only flash_v3 has.
"""

import pytest
import torch

from flash_ladder.kernels import choose, tiles
from flash_ladder.kernels.choice import BACKENDS
from tests.helpers.reference import HOPPER, MEANINGS, RUNGS, check, documents, make_case, slopes

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
each_rung = pytest.mark.parametrize("rung", RUNGS)


@each_rung
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("head_dim", [16, 24, 32, 40, 48, 56, 59, 64, 72, 80, 96, 104, 111, 120, 128, 160, 192, 256])
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
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("seq_q", "seq_k"), [(64, 64), (128, 128), (129, 127), (192, 384), (193, 385), (383, 255), (1, 129), (2111, 2111), (2100, 2500)]
)
def test_lengths_around_tiles(rung, seq_q, seq_k, head_dim, is_causal):
    """Tiles of 64, 128 and 192 queries, of 64 and 128 keys: full, one over, one short; and lengths for which settings change."""
    check(make_case(1, 2, 1, seq_q, seq_k, head_dim, BF16), rung, is_causal=is_causal)


@each_rung
@pytest.mark.parametrize(("n_head", "n_kv_head"), [(3, 3), (6, 2), (3, 1), (16, 2)])
def test_grouped_heads(rung, n_head, n_kv_head):
    check(make_case(2, n_head, n_kv_head, 300, 300, 64, BF16), rung, is_causal=True)


@each_rung
@pytest.mark.parametrize(("batch", "n_head", "n_kv_head", "seq", "head_dim"), [(3, 16, 16, 1000, 128), (5, 12, 4, 1100, 64)])
def test_more_tiles_than_multiprocessors(rung, batch, n_head, n_kv_head, seq, head_dim):
    """Where blocks stay on their multiprocessor, each takes several tiles, of other heads and batch entries."""
    check(make_case(batch, n_head, n_kv_head, seq, seq, head_dim, BF16), rung, is_causal=True)


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
@pytest.mark.parametrize("window_size", [2, 63, 64, 65, 127, 128, 129, 193, 399])
def test_windows_around_a_tile(rung, window_size, is_causal):
    check(make_case(1, 2, 1, 400, 400, 64, FP16), rung, is_causal=is_causal, window_size=window_size)


@each_rung
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    "cuts",
    [((64, 128, 192, 256), (128, 384)), ((63, 65, 127, 129, 193), (1, 255, 257, 399)), ((), tuple(range(120, 136)))],
    ids=["on the tiles", "off the tiles", "of one token"],
)
def test_documents_around_tiles(rung, cuts, is_causal):
    check(make_case(2, 2, 1, 400, 400, 64, FP16), rung, is_causal=is_causal, document_ids=documents(400, *cuts))


@each_rung
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("cuts", [((1, 400, 401, 640), (128, 256, 899)), (range(1, 900, 7), ())], ids=["long and short", "short"])
def test_documents(rung, cuts, is_causal):
    check(make_case(2, 2, 1, 900, 900, 64, BF16), rung, is_causal=is_causal, document_ids=documents(900, *cuts))


@each_rung
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
def test_everything_with_documents(rung, dtype):
    meaning = {"window_size": 150, "softcap": 2.0, "alibi_slopes": slopes(4), "document_ids": documents(500, (300,), (90, 91))}
    check(make_case(2, 4, 2, 500, 500, 64, dtype), rung, is_causal=True, **meaning)


# ---- the tiles of every generation ----


@pytest.mark.parametrize("meaning", ["causal", "everything"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("table", ["HOPPER", "LARGE", "SMALL", "TURING"])
def test_tiles_of_every_generation(monkeypatch, table, head_dim, meaning):
    """flash_v2 with the tiles it takes on other GPUs. flash_v1 has the same ones everywhere, and flash_v3 is for one GPU."""
    chosen = getattr(tiles, table)[head_dim]
    monkeypatch.setattr(BACKENDS["flash_v2"], "tiles", lambda *a: chosen)
    asked = MEANINGS[meaning] | ({"window_size": 200} if meaning == "everything" else {})
    check(make_case(1, 2, 1, 300, 400, head_dim, FP16), "flash_v2", **asked)


def test_auto_takes_the_best_rung_from_ampere_on():
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        pytest.skip("for Ampere and newer")
    assert (capability == (9, 0)) == HOPPER
    assert choose(torch.device("cuda"), BF16, 64).backend == ("flash_v3" if HOPPER else "flash_v2")
