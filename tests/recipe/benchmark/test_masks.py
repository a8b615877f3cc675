"""Whether time follows the visible area: which masks are meant, their area, and what is made of times. The times need a GPU."""

import pytest
import torch

import flash_ladder.benchmark.masks as module
import flash_ladder.kernels.sdpa
from flash_ladder.benchmark.masks import (
    Times,
    mask_arguments,
    measure_mask,
    measure_masks,
    measure_times,
    visible_pairs,
    with_masks,
)
from flash_ladder.benchmark.result import Masked
from flash_ladder.benchmark.timing import attend_with, gradients
from flash_ladder.kernels import attention
from flash_ladder.kernels.asked import Asked
from flash_ladder.kernels.bounds import key_bounds, visible
from flash_ladder.names import MASKED_PEERS, PEERS
from flash_ladder.script_schema import BenchmarkConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NAMES = ["window_5", "documents_10", "ragged_12"]


def config(**changes) -> BenchmarkConfig:
    values = dict(backends=["eager", "fa2", "flash_v2"], head_dim=[16, 32], width=64, dtype="float32", masks=NAMES, mask_seq_len=48)
    return BenchmarkConfig(**{**values, **changes})


# ---- masks ----


def lengths(name: str, seq_len: int) -> list[int]:
    """Of the documents that a mask packs."""
    ids = mask_arguments(name, seq_len, CPU)["document_ids"]
    assert ids.shape == (1, seq_len) and ids.dtype == torch.int32
    return ids[0].unique_consecutive(return_counts=True)[1].tolist()


def test_a_window():
    assert mask_arguments("window_5", 48, CPU) == {"window_size": 5}
    assert mask_arguments("window_4096", 48, CPU) == {"window_size": 48}


def test_documents():
    assert lengths("documents_16", 48) == [16, 16, 16]
    assert lengths("documents_10", 48) == [10, 10, 10, 10, 8]
    assert lengths("documents_4096", 48) == lengths("ragged_4096", 48) == [48]
    assert lengths("documents_1", 3) == lengths("ragged_1", 3) == [1, 1, 1] and lengths("ragged_1", 1) == [1]


def test_ragged_documents_have_that_mean_and_are_the_same_again():
    found = lengths("ragged_2048", 16384)
    assert len(found) == 8 and sum(found) == 16384 and len(set(found)) > 4
    assert found == lengths("ragged_2048", 16384)
    assert len(lengths("ragged_12", 50)) == 4


@pytest.mark.parametrize("name", NAMES)
def test_the_area_is_what_the_mask_leaves_visible(name):
    arguments = mask_arguments(name, 48, CPU)
    mask = visible(*key_bounds(Asked(1.0, is_causal=True, **arguments), 48, 48), 48)
    assert visible_pairs(48, arguments, CPU) == mask.sum() < visible_pairs(48, {}, CPU) == 48 * 49 / 2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", [None, *NAMES])
@pytest.mark.parametrize("backend", ["eager", "flex"])
def test_a_backend_attends_under_the_mask(monkeypatch, backend, name):
    """Against a softmax over a mask written out."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # FlexAttention as its definition
    arguments = {} if name is None else mask_arguments(name, 48, CPU)
    query, key, value = torch.randn(3, 1, 2, 48, 16, generator=torch.Generator().manual_seed(0))
    i, j = torch.arange(48)[:, None], torch.arange(48)
    mask = (j <= i) & (i - j < arguments.get("window_size", 48))
    ids = arguments.get("document_ids", torch.zeros(1, 48))[0]
    mask &= ids[:, None] == ids
    right = (query @ key.mT / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(attend_with(backend, True, 48, CPU, arguments)(query, key, value), right)


def test_who_takes_a_mask():
    assert with_masks(["eager", "fa2", "flash_v2", "flex", "fa4"]) == ["eager", "flash_v2", "flex", "fa4"]
    assert {*MASKED_PEERS} == {name for name, peer in PEERS.items() if peer.takes_masks}


# ---- times ----


@pytest.fixture
def clock(monkeypatch):
    """In place of a GPU's: a visible pair takes a millisecond forward and three backward, counted from what `attend` does.

    With scores all 0 and positions as values, query i, which sees the n keys up to itself, gets i - (n - 1) / 2.
    """

    def forward(attend, inputs, budget):
        zeros, positions = torch.zeros_like(inputs[0]), torch.arange(48.0)[:, None].expand_as(inputs[0]).contiguous()
        return (2 * (positions - attend(zeros, zeros, positions)) + 1)[0, 0, :, 0].sum().item()

    def backward(attend, inputs, grad_output, budget):
        assert gradients(attend(*inputs), inputs, grad_output)[0].shape == inputs[0].shape
        return 3 * forward(attend, inputs, budget)

    monkeypatch.setattr(module, "forward_milliseconds", forward)
    monkeypatch.setattr(module, "backward_milliseconds", backward)


@pytest.mark.parametrize(("backend", "name"), [*(("eager", name) for name in NAMES), ("flash_v2", "ragged_12")])
def test_a_time_that_follows_the_area(clock, backend, name):
    dense = measure_times(config(), backend, 32, {}, CPU)
    masked = measure_mask(config(), backend, 32, name, dense, CPU)
    assert (masked.mask, masked.backend, masked.head_dim, masked.seq_len, masked.note) == (name, backend, 32, 48, "")
    assert masked.dense_forward_ms == pytest.approx(48 * 49 / 2) and 0 < masked.area < 0.5
    assert (masked.forward, masked.backward) == pytest.approx((1, 1), rel=1e-4)


def test_every_mask_on_every_backend_with_masks(monkeypatch):
    """The dense time is taken once for all masks of a backend, and a row is there before the next is measured."""
    told = []

    def dense(cfg, backend, head_dim, arguments, device):
        assert arguments == {} and device == GPU
        return Times(float(head_dim), 1.0)

    def masked(cfg, backend, head_dim, name, dense, device):
        return Masked(name, backend, head_dim, cfg.mask_seq_len, 1.0, dense_forward_ms=dense.forward)

    monkeypatch.setattr(module, "measure_times", dense)
    monkeypatch.setattr(module, "measure_mask", masked)
    rows = measure_masks(config(), GPU, told.append)
    first = next(rows)
    assert told == ["eager without a mask, D=16", "eager under window_5, D=16"]
    found = [first, *rows]
    expected = [(backend, name, head_dim) for head_dim in (16, 32) for backend in ("eager", "flash_v2") for name in NAMES]
    assert [(row.backend, row.mask, row.head_dim) for row in found] == expected
    assert all(row.dense_forward_ms == row.head_dim for row in found) and len(told) == len(found) + 4
    told.clear()
    assert not list(measure_masks(config(), CPU, told.append)) and not list(measure_masks(config(masks=[]), GPU, told.append))
    assert not told


def test_a_refusal_is_a_note(clock, monkeypatch):
    """Asked of the operation, feature by feature."""
    monkeypatch.setattr(
        flash_ladder.kernels.sdpa,
        "unsupported",
        lambda device, dtype, head_dim, features: "no windows" if "window_size" in features else None,
    )
    dense = measure_times(config(), "sdpa", 48, {}, CPU)
    masked = measure_mask(config(), "sdpa", 48, "window_5", dense, CPU)
    assert masked.note.startswith("refused: attention backend sdpa cannot run here: no windows") and masked.forward is None
    assert measure_mask(config(), "sdpa", 48, "documents_10", dense, CPU).forward == pytest.approx(1, rel=1e-4)


def test_a_backend_without_a_backward(clock, monkeypatch):
    """Its forward is compared all the same."""

    def forward_alone(query, key, value):
        with torch.no_grad():
            return attention(query, key, value, is_causal=True, backend="eager")

    monkeypatch.setattr(module, "attend_with", lambda *_: forward_alone)
    times = measure_times(config(), "fa3", 16, {}, CPU)
    assert times.forward == pytest.approx(48 * 49 / 2) and times.backward is None and times.note == "no backward"


def test_out_of_memory_is_a_result(clock, monkeypatch):
    """Without the mask, backward: the forward is still compared; forward: no masked call is made."""

    def gone(*_):
        raise torch.OutOfMemoryError("none left")

    right = module.backward_milliseconds
    monkeypatch.setattr(module, "backward_milliseconds", gone)
    dense = measure_times(config(), "eager", 16, {}, CPU)
    assert dense.forward and dense.backward is None and dense.note == "out of memory"
    monkeypatch.setattr(module, "backward_milliseconds", right)
    masked = measure_mask(config(), "eager", 16, "window_5", dense, CPU)
    assert masked.forward == pytest.approx(1, rel=1e-4) and masked.backward is None and masked.backward_ms
    assert masked.note == "without the mask: out of memory"
    monkeypatch.setattr(module, "measure_times", gone)
    masked = measure_mask(config(), "eager", 16, "window_5", Times(note="out of memory"), CPU)
    assert masked.forward is None and masked.note == "without the mask: out of memory" and masked.area > 0
