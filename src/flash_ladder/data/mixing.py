"""Rows of text from several files: documents drawn from each in a given proportion."""

from __future__ import annotations

import datasets
import numpy as np

from flash_ladder.data.sources import quiet


def mix(parts: list[datasets.Dataset], weights: list[float], seed: int) -> datasets.Dataset:
    """Documents of `parts` (rows with "ends") in the order of `datasets.interleave_datasets`, until a part has no further one.

    weights: how often the next document comes from each part. No document comes twice, so that none can be held out and trained on.
    """
    # Of each part: the first row of every document among the rows of all parts, and the end of the last one.
    bounds: list[np.ndarray] = []
    for part in parts:
        start = bounds[-1][-1] if bounds else 0
        bounds.append(start + np.r_[0, np.flatnonzero(part.data.column("ends").to_numpy()) + 1])
    documents = [
        datasets.Dataset.from_dict({"part": [i] * (len(b) - 1), "document": range(len(b) - 1)}) for i, b in enumerate(bounds)
    ]
    drawn = datasets.interleave_datasets(
        documents, probabilities=[weight / sum(weights) for weight in weights], seed=seed, stopping_strategy="first_exhausted"
    )
    rows = [np.arange(bounds[i][n], bounds[i][n + 1]) for i, n in zip(drawn["part"], drawn["document"], strict=True)]
    with quiet(progress=False):
        return datasets.concatenate_datasets(parts).select(np.concatenate(rows)).flatten_indices()
