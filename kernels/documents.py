"""Where each position's document begins and ends: `kernels.bounds.document_bounds` as one kernel.

Every call with document_ids needs these bounds, forward and backward. PyTorch's three operations take 5 % of a forward pass at 16k
tokens.
"""

import triton
import triton.language as tl


@triton.jit
def bounds_kernel(IDS, FIRST, LAST, seq, n_block, steps, BLOCK: tl.constexpr):
    """One program: the bounds of BLOCK positions of one sequence, each found by halving what lies before it and what lies after.

    ids that decrease give bounds of no use, but within the sequence.
    """
    row = (tl.program_id(0) // n_block).to(tl.int64) * seq
    place = tl.program_id(0) % n_block * BLOCK + tl.arange(0, BLOCK)
    inside = place < seq
    own = tl.load(IDS + row + place, mask=inside, other=0)
    first_from, first_to = place * 0, tl.minimum(place, seq - 1)
    last_from, last_to = first_to, place * 0 + (seq - 1)
    for _ in range(steps):
        before = (first_from + first_to) // 2
        after = (last_from + last_to + 1) // 2
        is_other = tl.load(IDS + row + before) < own
        is_own = tl.load(IDS + row + after) <= own
        first_from = tl.where(is_other, before + 1, first_from)
        first_to = tl.where(is_other, first_to, before)
        last_from = tl.where(is_own, after, last_from)
        last_to = tl.where(is_own, last_to, after - 1)
    tl.store(FIRST + row + place, first_from, mask=inside)
    tl.store(LAST + row + place, last_to, mask=inside)
