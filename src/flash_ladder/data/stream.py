"""The documents of a hub stream in the order in which a rank trains on them, from any place on.

A stream is read shard by shard (of most data sets a shard is a file) and shuffled a block of rows at a time. A block is drawn anew
from where it begins, so a place is a few numbers. `datasets` forgets what is in its shuffle buffer when it saves a state. Its
`split_dataset_by_node` gives each rank a share of the rows to skip too, so that held-out ones would be trained on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
import numpy as np

from flash_ladder.errors import UserError

BLOCK = 1000  # rows that are shuffled together


class Place(NamedTuple):
    """Where a rank goes on reading. Rows and documents are counted from 0."""

    turn: int  # which shard, among the endless passes over all of them
    row: int  # of that shard, at which the block begins
    block: int  # how many blocks the rank has read before
    document: int = 0  # of the block, once shuffled
    token: int = 0  # of that document


def numbered_rows(stream: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    """The stream's rows in order, {"shard": its number, "row": the row's number in that shard, "text": str or None}."""
    for shard in range(stream.num_shards):
        for number, row in enumerate(stream.shard(stream.num_shards, shard)):
            yield {"shard": shard, "row": number, "text": row["text"]}


class StreamedDocuments:
    """Endless passes over the documents of a stream that are not held out, as one rank reads them.

    The shards of all passes make one sequence, of which a rank reads every world_size-th. Where there are fewer shards than ranks,
    a rank reads all of them and keeps every world_size-th row. A block ends with its pass, so that it has no document twice.

    begins: the shard, and the row in it, at which the held-out text has ended.
    """

    def __init__(self, stream: datasets.IterableDataset, begins: tuple[int, int], *, seed: int, rank: int, world_size: int) -> None:
        self.stream, self.seed, self.rank, self.world_size = stream, seed, rank, world_size
        self.first_shard, self.first_row = begins
        self.n_shards = stream.num_shards - self.first_shard
        self.by_shard = self.n_shards >= world_size
        self.beginning = Place(rank if self.by_shard else 0, row=0, block=0)

    def read(self, start: Place) -> Iterator[tuple[Place, str]]:
        """Yields documents that are not empty, each with its own place, from that of `start` on.

        Raises UserError where a whole pass has none for this rank.
        """
        for place, texts in self._blocks(start):
            order = np.random.default_rng([self.seed, self.rank, place.block]).permutation(len(texts))
            first = start.document if place.block == start.block else 0
            for i in range(first, len(texts)):
                yield place._replace(document=i), texts[order[i]]

    def _blocks(self, start: Place) -> Iterator[tuple[Place, list[str]]]:
        """The blocks from the one of `start` on, each with its place and the texts of its rows that have any."""
        place, rows, found = start._replace(document=0, token=0), [], start.block > 0
        step = self.world_size if self.by_shard else 1
        for turn in itertools.count(start.turn, step):
            for row, text in self._shard(turn, start.row if turn == start.turn else 0):
                rows.append(text)
                if len(rows) == BLOCK:
                    yield place, [text for text in rows if text]
                    place, rows, found = Place(turn, row + 1, place.block + 1), [], True
            if (turn + step) // self.n_shards > turn // self.n_shards:
                texts = [text for text in rows if text]
                if not texts and not found:
                    raise UserError(
                        f"a pass over the stream has no text for device {self.rank} of {self.world_size}; set data.streaming=false"
                    )
                yield place, texts
                place, rows, found = Place(turn + step, 0, place.block + 1), [], False

    def _shard(self, turn: int, row: int) -> Iterator[tuple[int, str | None]]:
        """This rank's rows of a shard from `row` on, with their numbers."""
        shard = self.first_shard + turn % self.n_shards
        if shard == self.first_shard:
            row = max(row, self.first_row)
        rows = self.stream.shard(self.stream.num_shards, shard).skip(row)
        for number, content in enumerate(rows, start=row):
            if self.by_shard or number % self.world_size == self.rank:
                yield number, content["text"]
