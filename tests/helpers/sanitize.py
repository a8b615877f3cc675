"""Kernels on small shapes, for a sanitizer: `compute-sanitizer --tool racecheck python -m tests.helpers.sanitize flash_v2`."""

import itertools
import sys

import torch

from tests.helpers.reference import MEANINGS, check, documents, make_case

# More than one tile each way, the last one ragged; one head_dim is padded; more keys than queries, and fewer.
SHAPES = [(130, 150, 64), (150, 100, 40)]
NAMES = ["causal", "everything"]

if __name__ == "__main__":
    rung = sys.argv[1]
    for (seq_q, seq_k, head_dim), name in itertools.product(SHAPES, NAMES):
        check(make_case(1, 2, 1, seq_q, seq_k, head_dim, torch.float16), rung, **MEANINGS[name])
    check(make_case(2, 2, 1, 130, 130, 128, torch.float16), rung, document_ids=documents(130, (1, 70), (64, 129)))
    check(make_case(1, 2, 1, 130, 150, 256, torch.float16), rung, is_causal=True)
    if rung == "flash_v3":  # its blocks stay on their multiprocessors; with more tiles than those, a block takes another
        check(make_case(1, 150, 150, 130, 130, 64, torch.float16), rung, is_causal=True)
    print(f"{rung}: done")
