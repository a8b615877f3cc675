"""How memory grows with the sequence length: the power of the length, fitted to what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Growth:
    """bytes = factor · seq_len ** exponent."""

    exponent: float
    factor: float
    lengths: tuple[int, ...]  # the lengths it was fitted to

    def bytes(self, seq_len: int) -> float:
        return self.factor * seq_len**self.exponent


def growth(bytes_by_length: Mapping[int, float], last: int = 3) -> Growth | None:
    """The least-squares line through log(bytes) over log(seq_len); None with fewer than two lengths.

    Only the `last` lengths count: at short ones the linear part (output, gradients) still hides the square of the scores.
    """
    lengths = tuple(sorted(length for length, size in bytes_by_length.items() if size > 0))[-last:]
    if len(lengths) < 2:
        return None
    x = [math.log(length) for length in lengths]
    y = [math.log(bytes_by_length[length]) for length in lengths]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return Growth(slope, math.exp(mean_y - slope * mean_x), lengths)
