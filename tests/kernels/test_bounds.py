"""Which keys a query sees: the bounds against a loop over pairs, in PyTorch and inside a kernel, both ways round."""

import pytest
import torch
import triton
import triton.language as tl

from flash_ladder.kernels.asked import Asked, numbers_for_kernels
from flash_ladder.kernels.bounds import document_bounds, key_bounds, visible
from flash_ladder.kernels.documents import document_ends
from flash_ladder.kernels.tile_ops import interval
from tests.helpers.reference import DEVICE, documents

CUTS = ((3, 4, 9), ())  # where documents start, in two batch entries
SHAPES = [(13, 13), (6, 13), (13, 6), (1, 13)]
WINDOWS = (None, 1, 4, 99)
CASES = [(*shape, is_causal, window, False) for shape in SHAPES for is_causal in (False, True) for window in WINDOWS]
CASES += [(13, 13, is_causal, window, True) for is_causal in (False, True) for window in WINDOWS]


def sees(i: int, j: int, is_causal: bool, window_size: int | None, ids: list[int] | None, shift: int) -> bool:
    """Whether query i sees key j, as attention's docstring has it."""
    place = i + shift
    if is_causal and j > place:
        return False
    if window_size is not None and abs(place - j) >= window_size:
        return False
    return ids is None or ids[i] == ids[j]


def by_hand(seq_q, seq_k, is_causal, window_size, ids) -> torch.Tensor:
    """The mask [1 or B, Sq, Sk]."""
    shift = seq_k - seq_q
    return torch.tensor(
        [
            [[sees(i, j, is_causal, window_size, entry, shift) for j in range(seq_k)] for i in range(seq_q)]
            for entry in ([None] if ids is None else ids.tolist())
        ],
        device=DEVICE,
    )


@pytest.mark.parametrize(("seq_q", "seq_k", "is_causal", "window_size", "packed"), CASES)
def test_bounds_are_the_mask(seq_q, seq_k, is_causal, window_size, packed):
    ids = documents(seq_q, *CUTS) if packed else None
    bounds = key_bounds(Asked(1.0, is_causal, window_size, document_ids=ids), seq_q, seq_k, DEVICE)
    expected = by_hand(seq_q, seq_k, is_causal, window_size, ids)
    assert torch.equal(visible(*bounds, seq_k)[:, 0], expected)
    for bound in bounds:  # both grow with the index: tiles take theirs from their first and last row
        assert (bound.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("bounds", [document_bounds, document_ends])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_document_bounds(dtype, bounds):
    """Ids of any integer dtype, in any memory order; a document of one token starts and ends there."""
    ids = torch.tensor([[0, 0, 5, 6, 6], [7, 7, 7, 7, 7]], device=DEVICE).to(dtype)
    for given in (ids, ids.T.contiguous().T):
        first, last = bounds(given)
        assert first.dtype == last.dtype == torch.int32 and first.is_contiguous() and last.is_contiguous()
        assert first.tolist() == [[0, 0, 2, 3, 3], [0] * 5] and last.tolist() == [[1, 1, 2, 4, 4], [4] * 5]


@pytest.mark.parametrize("seq", [1, 2, 255, 256, 257, 1000])
def test_document_ends(seq):
    """The kernel's bounds are PyTorch's, which eager attention reads: many short documents, one, and each position its own; in
    several blocks of positions and several sequences. Ids that decrease give bounds of no use, but within the sequence."""
    ids = torch.stack([torch.randint(0, 40, (seq,)).sort().values, torch.full((seq,), -3), torch.arange(seq)]).to(DEVICE)
    for mine, theirs in zip(document_ends(ids), document_bounds(ids), strict=True):
        assert torch.equal(mine, theirs)
    for bound in document_ends(torch.randint(0, 40, (3, seq), device=DEVICE)):
        assert bound.min() >= 0 and bound.max() < seq
    assert [x.shape for x in document_ends(ids[:, :0])] == [(3, 0)] * 2


@triton.jit
def interval_kernel(OUT, FIRST, LAST, n_own, n_other, shift, behind, ahead, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    first, last = interval(index, n_own, n_other, shift, behind, ahead, FIRST, LAST)
    tl.store(OUT + index, first)
    tl.store(OUT + BLOCK + index, last)


@pytest.mark.parametrize(("seq_q", "seq_k", "is_causal", "window_size", "packed"), CASES)
def test_kernels_have_the_same_bounds(seq_q, seq_k, is_causal, window_size, packed):
    """The keys of each query, and the queries of each key: what the kernels' walks start and end with."""
    ids = documents(seq_q, *CUTS)[:1] if packed else None
    mask = by_hand(seq_q, seq_k, is_causal, window_size, ids)[0]
    numbers = numbers_for_kernels(Asked(1.0, is_causal, window_size), seq_q, seq_k)
    first, last = (None, None) if ids is None else document_bounds(ids)
    ways = [(mask, seq_k - seq_q, numbers.behind, numbers.ahead), (mask.T, seq_q - seq_k, numbers.ahead, numbers.behind)]
    for seen, shift, behind, ahead in ways:
        n_own, n_other = seen.shape
        out = torch.full((2, 16), -77, dtype=torch.int32, device=DEVICE)
        interval_kernel[(1,)](out, first, last, n_own, n_other, shift, behind, ahead, BLOCK=16)
        partners = torch.arange(n_other, device=DEVICE)
        inside = (partners >= out[0, :, None]) & (partners <= out[1, :, None])
        assert torch.equal(inside[:n_own], seen)
        assert (out[:, n_own:] == out[:, n_own - 1 : n_own]).all()  # positions beyond the end count as the last one
