"""From one stream of tokens to batches: windows, their order, and Lightning's data module.

A window is seq_len + 1 tokens (the inputs and, one further, the targets). The next one starts seq_len tokens later, so that in one
pass every token but the first is predicted once. A batch's windows depend on how many came before, the seed and the rank alone.
So a resume needs that count and nothing else, and the number of loading processes changes nothing. A stream's batches bring the
place in it along, because one that is read ahead has not been trained on.
"""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from tqdm import tqdm

from flash_ladder.data.corpus import Corpus, DataStats, TokenStream, open_corpus
from flash_ladder.data.stream import Place, StreamedDocuments
from flash_ladder.data.tokenizer import Tokenizer
from flash_ladder.errors import UserError, first_line
from flash_ladder.schema import DataConfig
from flash_ladder.stopping import SIGNALS

Example = dict[str, Any]  # tensors, and of a stream's batch the place after it


def to_example(tokens: np.ndarray, eos_id: int | None) -> Example:
    """Returns {"tokens": int64 [seq_len + 1]} and, given `eos_id`, "document_ids": int32 [seq_len], from 0 in each window."""
    example = {"tokens": torch.from_numpy(tokens.astype(np.int64))}
    if eos_id is not None:
        ids = np.zeros(len(tokens) - 1, dtype=np.int32)
        np.cumsum(tokens[:-2] == eos_id, out=ids[1:])  # <|endoftext|> still belongs to the document it ends
        example["document_ids"] = torch.from_numpy(ids)
    return example


class Windows(Dataset[Example]):
    """The windows of a token stream, in order; at most the last seq_len tokens are left over."""

    def __init__(self, tokens: TokenStream, seq_len: int, eos_id: int | None) -> None:
        self.tokens, self.seq_len, self.eos_id = tokens, seq_len, eos_id

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, window: int) -> Example:
        start = int(window) * self.seq_len
        return to_example(self.tokens.read(start, start + self.seq_len + 1), self.eos_id)


class StreamedBatches(IterableDataset[Example]):
    """Endless batches of a hub stream, which is read, tokenised and packed while training runs.

    Each has "place" beside its examples: where the window after it begins, from which a resumed run goes on. Without `start` the
    stream is read from its beginning, and the `first` windows are made and dropped.
    """

    def __init__(
        self, cfg: DataConfig, tokenizer: Tokenizer, documents: StreamedDocuments, start: Place | None, first: int
    ) -> None:
        self.cfg, self.tokenizer, self.documents = cfg, tokenizer, documents
        self.start, self.first = start, first

    def __iter__(self) -> Iterator[Example]:
        windows = self._windows()
        if self.start is None:
            skipped = itertools.islice(windows, self.first)
            for _ in tqdm(skipped, desc="reading the stream up to where the run stopped", total=self.first, delay=2, leave=False):
                pass
        eos_id = self.tokenizer.eos_id if self.cfg.document_ids else None
        while batch := list(itertools.islice(windows, self.cfg.batch_size)):
            yield {**default_collate([to_example(tokens, eos_id) for tokens, _ in batch]), "place": batch[-1][1]}

    def _windows(self) -> Iterator[tuple[np.ndarray, Place]]:
        """Windows, each with the place at which the next one begins."""
        start = self.start or self.documents.beginning
        seq_len, tokens, offset = self.cfg.seq_len, np.empty(0, dtype=np.int64), start.token
        packed: deque[tuple[Place, int]] = deque()  # the documents that the tokens come from, and how many each has
        for place, text in self.documents.read(start):
            ids = [*self.tokenizer.encode(text), self.tokenizer.eos_id]
            if not packed:
                offset = min(offset, len(ids) - 1)  # the document may be a shorter one than when the place was noted
            tokens = np.concatenate([tokens, ids[0 if packed else offset :]])
            packed.append((place, len(ids)))
            while len(tokens) > seq_len:
                offset += seq_len
                while offset >= packed[0][1]:
                    offset -= packed.popleft()[1]
                yield tokens[: seq_len + 1], packed[0][0]._replace(token=offset)
                tokens = tokens[seq_len:]


class TrainingOrder:
    """A batch sampler without end: window numbers for one rank, once all ranks together have taken `first` windows.

    The windows form one endless sequence; each pass over them is a permutation drawn from (seed, pass). Batch b of rank r takes the
    batch_size entries from first + (b * world_size + r) * batch_size on, so all ranks together go through the sequence once.
    """

    def __init__(self, n_windows: int, batch_size: int, *, seed: int, rank: int, world_size: int, first: int) -> None:
        self.n_windows, self.batch_size, self.seed = n_windows, batch_size, seed
        self.rank, self.world_size, self.first = rank, world_size, first

    def __iter__(self) -> Iterator[list[int]]:
        drawn = -1
        permutation: np.ndarray = np.empty(0)
        for batch in itertools.count():
            first = self.first + (batch * self.world_size + self.rank) * self.batch_size
            windows = []
            for epoch, position in (divmod(entry, self.n_windows) for entry in range(first, first + self.batch_size)):
                if epoch != drawn:
                    drawn, permutation = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n_windows)
                windows.append(int(permutation[position]))
            yield windows


def validated(n_tokens: int, cfg: DataConfig, val_batches: int, world_size: int) -> tuple[int, int]:
    """`TextData.validated`, of a validation part of `n_tokens`."""
    n_windows = min(max(0, n_tokens - 1) // cfg.seq_len, val_batches * cfg.batch_size)
    batch_size = min(cfg.batch_size, n_windows // world_size)
    if batch_size == 0:
        raise UserError(
            f"the validation part has {n_windows} windows for {world_size} devices that each read their own; add text, raise "
            "data.val_fraction or lower data.seq_len"
        )
    return n_windows - n_windows % (world_size * batch_size), batch_size


def ignore_signals(worker: int) -> None:
    """Keeps a loading process alive when Ctrl-C or a scheduler signals the whole group: its parent still wants a step's batches.

    It ends when its parent does.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


class LoadingLost(RuntimeError):
    """A loading process died."""


class Loader(DataLoader):
    """PyTorch's, less its handler of SIGCHLD, which raises wherever the main thread is when a loading process dies.

    That may be inside a save of a checkpoint, which then looks like a full disk, or in a logger's call. Without the handler the
    loss is noticed where the next batch is waited for, within five seconds, and raises LoadingLost.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        before = signal.getsignal(signal.SIGCHLD)
        batches = super().__iter__()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)
        try:
            yield from batches
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # Of what a live process raises torch says "Caught ... in DataLoader worker"; the rest is a connection that broke.
            if not self.num_workers or str(error).startswith("Caught"):
                raise
            raise LoadingLost(first_line(error)) from error


def end_loading() -> None:
    """Kills the loading processes that a run left behind. Python would send them SIGTERM, which they ignore, and wait for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def of_all_ranks(place: Place | None, world_size: int) -> list[Place | None]:
    """Every rank's place, in the order of the ranks."""
    places: list[Place | None] = [place] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(places, place)
    return places


class TextData(lightning.LightningDataModule):
    """The text that `cfg` names, as batches of {"tokens": int64 [B, seq_len + 1]}.

    With cfg.document_ids also "document_ids": int32 [B, seq_len], non-decreasing from 0 in each row.
    `accumulate` is the batches per optimiser step, by which training knows its place in the text. A checkpoint holds that place, so
    that a resumed run with other batches, or on other devices, reads no window twice and leaves none out. `val_batches` is how many
    batches a validation reads on all devices together, so that its loss does not depend on the number of devices.
    `context_parallel` is how many successive ranks hold their sequences together: they read the same windows, as one reader.
    """

    # From `prepare` on.
    tokenizer: Tokenizer
    stats: DataStats
    _corpus: Corpus

    def __init__(self, cfg: DataConfig, *, seed: int, accumulate: int = 1, val_batches: int, context_parallel: int = 1) -> None:
        super().__init__()
        self.cfg, self.seed, self.accumulate, self.val_batches = cfg, seed, accumulate, val_batches
        self.context_parallel = context_parallel
        self.resumed_step = self.resumed_tokens = 0  # the step that this start goes on from, and the tokens read until then
        self.resumed_stream: dict[str, Any] | None = None  # every reader's place in a stream at that step
        self.places: dict[int, Place | None] = {}  # this reader's place in a stream after the last step, and after the next

    def prepare(self) -> None:
        """Opens the tokens, and first puts them into the cache if they are not there. Needs no trainer. A second call does nothing.

        Every process calls it: the first one builds the cache, the others wait. Sets `tokenizer` and `stats`.
        Raises UserError for data that cannot be used, such as a part shorter than one window.
        """
        if hasattr(self, "_corpus"):
            return
        corpus = open_corpus(self.cfg, self.seed)
        window = self.cfg.seq_len + 1
        if len(corpus.train) < window and not self.cfg.streaming:
            raise UserError(
                f"the text is {len(corpus.train)} training tokens, shorter than one window of {window} (data.seq_len + 1): "
                "add text or lower data.seq_len"
            )
        if len(corpus.val) < window:
            raise UserError(
                f"the validation part is {len(corpus.val)} tokens, shorter than one window of {window} (data.seq_len + 1): "
                "add text, raise data.val_fraction or lower data.seq_len"
            )
        self._corpus, self.tokenizer, self.stats = corpus, corpus.tokenizer, corpus.stats

    def setup(self, stage: str) -> None:
        """Lightning's hook, for a trainer that was given this module unprepared."""
        self.prepare()

    def train_dataloader(self) -> DataLoader:
        """Returns an endless loader of this reader's batches, from `trainer.global_step` on."""
        rank, world_size = self._reader()
        first = self._tokens_read() // self.cfg.seq_len  # windows of all ranks
        whose = {"seed": self.seed, "rank": rank, "world_size": world_size}
        batch_size, num_workers = self.cfg.batch_size, self.cfg.num_workers
        if self.cfg.streaming:
            assert self._corpus.stream is not None and self._corpus.train_begins is not None
            documents = StreamedDocuments(self._corpus.stream, self._corpus.train_begins, **whose)
            start = None if first else documents.beginning
            if self.resumed_stream is not None and self.fits_stream(self.resumed_stream, world_size):
                start = Place(**self.resumed_stream["places"][rank])
            self.places = {self.resumed_step: start}
            streamed = StreamedBatches(self.cfg, self.tokenizer, documents, start, first // world_size)
            # One process reads a rank's share of a stream, so that there is one place.
            return self._loader(streamed, min(1, num_workers), batch_size=None)
        windows = self._windows(self._corpus.train)
        order = TrainingOrder(len(windows), batch_size, first=first, **whose)
        return self._loader(windows, num_workers, batch_sampler=order)

    def _tokens_read(self) -> int:
        """How many tokens all ranks together have read for the optimiser steps that are done."""
        if self.trainer is None:
            return 0
        a_step = self.accumulate * self.cfg.batch_size * self._reader()[1] * self.cfg.seq_len
        return self.resumed_tokens + (self.trainer.global_step - self.resumed_step) * a_step

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Lightning's hook, for a batch that is about to be used: notes its place in a stream."""
        if "place" in batch:
            assert self.trainer is not None
            step = self.trainer.global_step
            self.places = {step: self.places.get(step), step + 1: batch.pop("place")}
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the text, for a checkpoint. Of a stream all processes call it together."""
        assert self.trainer is not None
        step = self.trainer.global_step
        state: dict[str, Any] = {"step": step, "tokens": self._tokens_read()}
        if self.cfg.streaming:
            places = of_all_ranks(self.places.get(step), self.trainer.world_size)[:: self.context_parallel]
            known = [place._asdict() for place in places if place is not None]
            if len(known) == len(places):
                state["stream"] = {**self._stream(), "places": known}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the place in the text from a checkpoint. One without it was written with the present batches on as many devices."""
        self.resumed_step, self.resumed_tokens, self.resumed_stream = state["step"], state["tokens"], state.get("stream")

    def fits_stream(self, state: dict[str, Any], world_size: int) -> bool:
        """Whether the places in a stream that a checkpoint has are of this stream and order, shared out over as many readers."""
        same = all(state.get(name) == value for name, value in self._stream().items())
        return same and len(state["places"]) == world_size

    def _stream(self) -> dict[str, int]:
        """What the places in a stream hold for, beside the number of devices."""
        assert self._corpus.stream is not None
        return {"n_shards": self._corpus.stream.num_shards, "seed": self.seed}

    def val_dataloader(self) -> DataLoader:
        """Returns this reader's share of the `validated` windows."""
        rank, world_size = self._reader()
        n_windows, batch_size = self.validated(world_size)
        starts = range(rank * batch_size, n_windows, world_size * batch_size)
        batches = [list(range(start, start + batch_size)) for start in starts]
        return self._loader(self._windows(self._corpus.val), 0, batch_sampler=batches)

    def validated(self, world_size: int) -> tuple[int, int]:
        """How many windows, from the first on, a validation by `world_size` readers reads, and how many make a batch.

        At most `val_batches` full batches over all readers. Each gets equally many batches of one size. That size is smaller than
        cfg.batch_size where there are too few windows. Raises UserError where a reader would get none.
        """
        return validated(self.stats.n_val_tokens, self.cfg, self.val_batches, world_size)

    def val_windows(self, n: int | None = None) -> Example:
        """Returns the first `n` validation windows (None: all; fewer if there are fewer) as one batch, on the CPU."""
        windows = self._windows(self._corpus.val)
        return default_collate([windows[i] for i in range(len(windows) if n is None else min(n, len(windows)))])

    def _windows(self, tokens: TokenStream) -> Windows:
        return Windows(tokens, self.cfg.seq_len, self.tokenizer.eos_id if self.cfg.document_ids else None)

    def _reader(self) -> tuple[int, int]:
        """Which of how many readers this process is."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank // self.context_parallel, self.trainer.world_size // self.context_parallel

    def _loader(self, windows: Dataset, num_workers: int, **batching: Any) -> DataLoader:
        return Loader(
            windows,
            num_workers=num_workers,
            worker_init_fn=ignore_signals,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # else a loader draws from the global one, and dropout would shift
            **batching,
        )
