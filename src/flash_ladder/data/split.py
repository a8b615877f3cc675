"""Which text a run trains on and which it validates on: rows of text, those to train on first.

A share of the text is held out by document, or where documents do not allow that, by position. A stream holds out its beginning.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute

from flash_ladder.data.arrays import open_array
from flash_ladder.data.stream import numbered_rows
from flash_ladder.errors import UserError
from flash_ladder.schema import DataConfig

MB = 1 << 20
BPE_BYTES_PER_TOKEN = 2048  # a BPE of V tokens is trained on about V times this many bytes: more take time and hardly change it
ROW_TOKENS = 1 << 16  # of a file of tokens
STREAM_VALIDATION_BYTES = 16 * MB  # size of a stream's first documents, which are held out


@dataclass(frozen=True)
class Text:
    """Rows of text (or of tokens in `arrays`): the first `n_train_rows` are for training, the rest for validation."""

    rows: datasets.Dataset
    n_train_rows: int
    n_bytes: int
    n_documents: int
    split: str
    train_begins: tuple[int, int] | None = None  # of a stream: the shard, and the row in it, after what is held out
    arrays: tuple[Path, ...] = ()  # rows then are a file's number, and which of its tokens


def with_ends(rows: datasets.Dataset) -> datasets.Dataset:
    """Rows of a hub data set, which are documents, as those of files are."""
    return rows.add_column("ends", np.ones(len(rows), dtype=bool))


def text_of_rows(rows: datasets.Dataset, val_rows: datasets.Dataset | None, cfg: DataConfig, seed: int) -> Text:
    """All the rows, those to validate on at the end: `val_rows`, or documents that `seed` draws, or else the text's last part."""
    sizes = pyarrow.compute.binary_length(rows.data.column("text")).fill_null(0).to_numpy()
    if sizes.sum() == 0:
        raise UserError("the data holds no text: every document is empty")
    ends = rows.data.column("ends").to_numpy()
    document = np.cumsum(ends) - ends  # of each row
    n_documents, n_bytes = int(ends.sum()), int(sizes.sum())
    if val_rows is not None:
        both = datasets.concatenate_datasets([rows, val_rows])
        n_bytes += pyarrow.compute.sum(pyarrow.compute.binary_length(val_rows.data.column("text"))).as_py() or 0
        return Text(both, len(rows), n_bytes, n_documents + sum(val_rows["ends"]), "data.val_files")
    place = np.random.default_rng(seed).permutation(n_documents)  # of each document, in a random order
    if cfg.split_seed is None:
        n_held_out = min(n_documents - 1, max(1, round(n_documents * cfg.val_fraction)))
        is_held_out = place >= n_documents - n_held_out
    else:
        is_held_out = held_out_documents(np.bincount(document, weights=sizes).astype(np.int64), place, cfg.val_fraction)
    if not is_held_out.any():
        rows, n_train_rows = _split_by_position(rows, sizes, cfg.val_fraction)
        split = "by position: the last part of the text, whose documents are too few or too large to be held out whole"
        return Text(rows, n_train_rows, n_bytes, n_documents, split)
    # Shuffled, so that the first few held-out documents are a fair sample and the tokenising processes get equal shares.
    order = np.lexsort((place[document], is_held_out[document]))
    return Text(rows.select(order), int((~is_held_out[document]).sum()), n_bytes, n_documents, "by document")


def held_out_documents(sizes: np.ndarray, place: np.ndarray, val_fraction: float) -> np.ndarray:
    """Which documents are held out, bool [documents]: from the end of the order, nearest to `val_fraction` of the bytes.

    sizes: bytes of each document. place: its place in the order. A document that is larger than that share is passed over. No
    document is held out where those that are left would be less than half of the share.
    """
    share, is_held_out = val_fraction * sizes.sum(), np.zeros(len(sizes), dtype=bool)
    order = np.argsort(-place)
    order = order[sizes[order] <= share]
    held_out = np.cumsum(sizes[order])
    held_out = held_out[held_out < sizes.sum()]  # some text is left to train on
    n = int(np.abs(held_out - share).argmin()) + 1 if len(held_out) else 0
    if n and held_out[n - 1] >= share / 2:
        is_held_out[order[:n]] = True
    return is_held_out


def _split_by_position(rows: datasets.Dataset, sizes: np.ndarray, val_fraction: float) -> tuple[datasets.Dataset, int]:
    """Cuts the text in two; returns the rows, and how many belong to the first part. `sizes` are bytes per row."""
    n, position = len(rows), (1 - val_fraction) * sizes.sum()
    row = int(np.searchsorted(np.cumsum(sizes), position))  # the row to cut
    text = rows[row]["text"]
    cut = round(len(text) * (position - sizes[:row].sum()) / sizes[row])
    halves = datasets.Dataset.from_dict(
        {"text": [text[:cut], text[cut:]], "ends": [True, rows[row]["ends"]]}, features=rows.features
    )
    return datasets.concatenate_datasets([rows, halves]).select(np.r_[:row, n, n + 1, row + 1 : n]), row + 1


def text_of_stream(stream: datasets.IterableDataset, cfg: DataConfig) -> Text:
    """A stream's beginning: the documents to hold out, then a sample of the training documents for the tokenizer."""
    rows = numbered_rows(stream)
    held_out = take(rows, STREAM_VALIDATION_BYTES)
    first = next(rows, None)
    if first is None:
        raise UserError(
            f"data.hub_name={cfg.hub_name} has less text than a stream holds out for validation "
            f"({STREAM_VALIDATION_BYTES // MB} MB); set data.streaming=false"
        )
    sample = take(itertools.chain([first], rows), max(STREAM_VALIDATION_BYTES, BPE_BYTES_PER_TOKEN * cfg.vocab_size))
    texts = sample + held_out
    return Text(
        rows=datasets.Dataset.from_dict({"text": texts}),
        n_train_rows=len(sample),
        n_bytes=sum(map(len, texts)),
        n_documents=len(texts),
        split=f"the stream's first {len(held_out)} documents",
        train_begins=(first["shard"], first["row"]),
    )


def text_of_arrays(files: list[Path], val_files: list[Path], cfg: DataConfig) -> Text:
    """Tokens as they are, a row for every ROW_TOKENS; their last part is held out where `val_files` are not there for that."""
    paths = tuple(files + val_files)
    lengths = [len(open_array(path)) for path in paths]
    n_train = sum(lengths[: len(files)]) if val_files else round((1 - cfg.val_fraction) * sum(lengths))
    rows: dict[str, list[int]] = {"file": [], "start": [], "stop": []}
    n_train_rows = begin = 0
    for i, length in enumerate(lengths):
        cuts = sorted(
            {0, *range(ROW_TOKENS, length, ROW_TOKENS), *({n_train - begin} if 0 < n_train - begin < length else ()), length}
        )
        for start, stop in itertools.pairwise(cuts):
            n_train_rows += begin + stop <= n_train
            for name, value in (("file", i), ("start", start), ("stop", stop)):
                rows[name].append(value)
        begin += length
    split = "data.val_files" if val_files else "by position: the last part of the tokens"
    n_bytes = sum(path.stat().st_size for path in paths)
    return Text(datasets.Dataset.from_dict(rows), n_train_rows, n_bytes, 0, split, arrays=paths)


def take(rows: Iterator[dict], n_bytes: int) -> list[str]:
    """The texts of the next rows, up to `n_bytes` of them."""
    texts, size = [], 0
    while size < n_bytes and (row := next(rows, None)) is not None:
        texts.append(row["text"] or "")
        size += len(texts[-1].encode())
    return texts
