"""From rows of text to one stream of tokens on disk, which is built once and kept in a cache.

A cache entry is a folder: tokens*.arrow (one list of token ids a row, training documents first, then the validation ones),
tokenizer.json and corpus.json, which has the digests of the others and is checked when the entry is opened. Its name is a
fingerprint of everything that decides its content. It is built under another name and renamed when complete, by one process while
the others wait.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import xxhash
from filelock import FileLock
from tqdm import tqdm

from flash_ladder.data import split
from flash_ladder.data.arrays import ENDINGS as ARRAYS
from flash_ladder.data.arrays import read_span
from flash_ladder.data.mixing import mix
from flash_ladder.data.sources import (
    content_hash,
    digest,
    hub_fingerprint,
    kind,
    open_hub,
    quiet,
    read_files,
    stdlib_files,
    user_files,
)
from flash_ladder.data.split import Text, take, text_of_arrays, text_of_rows, text_of_stream, with_ends
from flash_ladder.data.tokenizer import FILE as TOKENIZER
from flash_ladder.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from flash_ladder.errors import UserError, first_line
from flash_ladder.files import checksum, is_sealed, make_writable, write_json
from flash_ladder.schema import DataConfig, as_list

FORMAT = 2  # of a cache entry; part of its name
STREAM_FORMAT = 3  # of a stream's
MB = 1 << 20
STATS = "corpus.json"


@dataclass(frozen=True)
class DataStats:
    """What a run trains on. Token counts include the <|endoftext|> after each document; None: unknown of a stream."""

    n_documents: int | None
    n_bytes: int | None
    n_train_tokens: int | None
    n_val_tokens: int
    unigram_entropy: float  # nats per token: the validation tokens under the training tokens' frequencies, each count plus one
    corpus: str  # fingerprint of the text
    split: str  # how the validation part was taken


class TokenStream:
    """Token ids of many documents, end to end: a view of a memory-mapped Arrow column, from token `start` to token `stop`."""

    def __init__(self, files: list[Path], start: int = 0, stop: int | None = None) -> None:
        self._files = files
        tables = [datasets.Dataset.from_file(str(path)).with_format("arrow")[:] for path in files]
        lists = [chunk for table in tables for chunk in table["tokens"].chunks]
        self._chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in lists]
        self._offsets = np.cumsum([0, *map(len, self._chunks)])
        self._start, self._stop = start, int(self._offsets[-1]) if stop is None else stop

    def __len__(self) -> int:
        return self._stop - self._start

    def part(self, start: int, stop: int) -> TokenStream:
        """Returns tokens start to stop as a stream of their own; no copy."""
        return TokenStream(self._files, self._start + start, self._start + stop)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens start to stop (within the stream) as one array, uint16 or uint32."""
        return np.concatenate(list(self.pieces(start, stop)))

    def pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields tokens start to stop as views of the file, wherever it is contiguous."""
        start, stop = self._start + start, self._start + stop
        chunk = int(np.searchsorted(self._offsets, start, side="right")) - 1
        while start < stop:
            first = int(self._offsets[chunk])
            piece = self._chunks[chunk][start - first : stop - first]
            yield piece
            start, chunk = first + len(self._chunks[chunk]), chunk + 1

    def counts(self, vocab_size: int) -> np.ndarray:
        """Returns how often each token occurs, int64 [vocab_size]."""
        total = np.zeros(vocab_size, dtype=np.int64)
        for piece in self.pieces(0, len(self)):
            total += np.bincount(piece, minlength=vocab_size)
        return total

    def __reduce__(self) -> tuple:
        return TokenStream, (self._files, self._start, self._stop)  # a worker process maps the files itself


@dataclass(frozen=True)
class Corpus:
    """A cache entry, opened. Of a stream, `val` is the rows before `train_begins`, and `train` only the tokenizer's sample."""

    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream
    stats: DataStats
    train_begins: tuple[int, int] | None  # of a stream: see split.Text
    stream: datasets.IterableDataset | None = None


def open_corpus(cfg: DataConfig, seed: int) -> Corpus:
    """Opens the cache entry for `cfg`, building it if this is the first time. `seed`: the run's, where cfg.split_seed is None.

    Any number of processes may call it at once. Raises UserError for data that cannot be used and a cache that cannot be written.
    """
    entries = [user_files([path]) for path in cfg.paths()]
    files = stdlib_files() if cfg.source == "stdlib" else list(dict.fromkeys(path for entry in entries for path in entry))
    val_files = user_files(as_list(cfg.val_files), "data.val_files")
    tokenizer = None if cfg.tokenizer in ("bpe", "bytes") else Tokenizer.read(Path(cfg.tokenizer).expanduser())
    are_tokens = _are_tokens(cfg, files, val_files)
    hub = open_hub(cfg) if cfg.source == "hub" else None
    fingerprint = digest(content_hash(files), cfg.text_column) if hub is None else hub_fingerprint(cfg, hub)
    if (
        hub is not None and cfg.streaming and cfg.split_seed is not None
    ):  # its beginning tells whether the cache holds the text that it holds out
        fingerprint = digest(fingerprint, take(iter(hub), split.STREAM_VALIDATION_BYTES))
    if cfg.weights:
        if sum(map(len, entries)) > len(files):
            raise UserError(
                "data.weights: a file belongs to two entries of data.files, and could be held out and trained on; name it once"
            )
        fingerprint = digest(fingerprint, [content_hash(entry) for entry in entries], cfg.weights)
    if val_files:
        fingerprint = digest(fingerprint, content_hash(val_files))
    vocab_size = cfg.vocab_size if cfg.tokenizer == "bpe" else None
    val_fraction = None if cfg.streaming or val_files else cfg.val_fraction
    seed = seed if cfg.split_seed is None else cfg.split_seed
    how = cfg.tokenizer if tokenizer is None else tokenizer.fingerprint
    format = STREAM_FORMAT if cfg.streaming else FORMAT
    key = digest(format, fingerprint, how, vocab_size, seed, cfg.split_seed is None, val_fraction)

    def build(folder: Path) -> None:
        def rows_of(files: list[Path], name: str) -> datasets.Dataset:
            return read_files(files, cfg.text_column, folder / name)

        if are_tokens:
            text = text_of_arrays(files, val_files, cfg)
        elif cfg.streaming:
            text = text_of_stream(hub, cfg)
        else:
            if hub is not None:
                rows = with_ends(hub)
            elif cfg.weights:
                rows = mix([rows_of(entry, f"text{i}") for i, entry in enumerate(entries)], cfg.weights, seed)
            else:
                rows = rows_of(files, "text")
            text = text_of_rows(rows, rows_of(val_files, "val") if val_files else None, cfg, seed)
        _write(folder, text, cfg, seed, fingerprint, tokenizer)
        for left in folder.iterdir():
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)

    entry = _cached(Path(cfg.cache_dir or "~/.cache/flash_ladder").expanduser(), key, build)
    try:
        return replace(_read(entry), stream=hub if cfg.streaming else None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pyarrow.ArrowException) as error:
        reason = first_line(error)
        raise UserError(f"the data cache {entry} is damaged ({reason}); delete that folder and it is built again") from None


# ---- the cache ----


def _cached(cache: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Returns the folder cache/key; where there is none, one process makes it with `build` while the others wait."""
    entry, partial = cache / key, cache / f"{key}.partial"
    if entry.is_dir():
        return entry
    make_writable(cache, "the data cache", "data.cache_dir")
    with FileLock(cache / f"{key}.lock"):
        if entry.is_dir():  # built while this process waited
            return entry
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        partial.mkdir()
        try:
            build(partial)
            os.replace(partial, entry)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"the data cache {cache} is full ({error.strerror}); set data.cache_dir=PATH") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return entry


def _read(entry: Path) -> Corpus:
    saved = json.loads((entry / STATS).read_text())
    if not is_sealed(saved):
        raise ValueError(f"{STATS} was changed")
    size = sum(path.stat().st_size for path in entry.iterdir())
    with tqdm(desc="checking the tokens", total=size, unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for name, expected in saved["files"].items():
            if checksum(entry / name, xxhash.xxh3_128) != expected:
                raise ValueError(f"{name} was changed")
            bar.update((entry / name).stat().st_size)
    tokens, n_train = TokenStream(_token_files(entry)), saved["n_train_tokens"]
    train, val = tokens.part(0, n_train), tokens.part(n_train, len(tokens))
    begins = saved.get("train_begins")
    return Corpus(Tokenizer.load(entry), train, val, DataStats(**saved["stats"]), begins and tuple(begins))


def _token_files(entry: Path) -> list[Path]:
    return sorted(entry.glob("tokens*.arrow"))  # one per process that tokenised, in the order of the rows


def _are_tokens(cfg: DataConfig, files: list[Path], val_files: list[Path]) -> bool:
    """Whether the files hold tokens. Raises UserError where that does not go together with the rest."""
    tokens = [path for path in files + val_files if kind(path) in ARRAYS]
    if not tokens:
        return False
    if len(tokens) < len(files + val_files):
        raise UserError(f"data.files: {tokens[0]} holds tokens, and other files text; name one kind")
    if cfg.tokenizer in ("bpe", "bytes") or cfg.weights:
        reason = "is of text, by document; leave data.weights out" if cfg.weights else "none of ours; data.tokenizer=PATH names its"
        raise UserError(f"{tokens[0]} holds tokens, and {'mixing' if cfg.weights else 'the tokenizer that wrote them is'} {reason}")
    return True


# ---- tokens ----


def _write(folder: Path, text: Text, cfg: DataConfig, seed: int, fingerprint: str, tokenizer: Tokenizer | None) -> None:
    """Writes a cache entry's files into `folder`. tokenizer: the user's own."""
    if tokenizer is None:
        tokenizer = byte_tokenizer() if cfg.tokenizer == "bytes" else _trained_bpe(text, cfg.vocab_size, seed)
    tokenizer.save(folder)
    n_train_tokens = _tokenise(folder, text, tokenizer, cfg.num_proc)

    tokens = TokenStream(_token_files(folder))
    n_val_tokens = len(tokens) - n_train_tokens
    n_documents = int(tokens.counts(tokenizer.vocab_size)[tokenizer.eos_id]) if text.arrays else text.n_documents
    stats = DataStats(
        n_documents=None if cfg.streaming else n_documents,
        n_bytes=None if cfg.streaming else text.n_bytes,
        n_train_tokens=None if cfg.streaming else n_train_tokens,
        n_val_tokens=n_val_tokens,
        unigram_entropy=_unigram_entropy(tokens, n_train_tokens, tokenizer.vocab_size),
        corpus=fingerprint,
        split=text.split,
    )
    files = {path.name: checksum(path, xxhash.xxh3_128) for path in [*_token_files(folder), folder / TOKENIZER]}
    saved = {"n_train_tokens": n_train_tokens, "train_begins": text.train_begins, "stats": asdict(stats), "files": files}
    write_json(folder / STATS, saved, sealed=True)


def _trained_bpe(text: Text, vocab_size: int, seed: int) -> Tokenizer:
    """A BPE trained on a random sample of the training rows (all of them where they are few)."""
    wanted = min(text.n_bytes, split.BPE_BYTES_PER_TOKEN * vocab_size)
    n_rows = math.ceil(len(text.rows) * wanted / text.n_bytes)
    sample = np.sort(np.random.default_rng(seed).permutation(text.n_train_rows)[:n_rows])
    batches = text.rows.select(sample).iter(batch_size=100)
    texts = (row for batch in batches for row in batch["text"] if row)
    return train_bpe(texts, vocab_size, show_progress=wanted > 16 * MB)


def _tokenise(folder: Path, text: Text, tokenizer: Tokenizer, num_proc: int) -> int:
    """Writes folder/tokens*.arrow, a row of tokens for each row of text, and returns the number of training tokens."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    num_proc = min(num_proc, len(text.rows), text.n_bytes // MB)  # a process costs about as much as a megabyte
    with quiet(progress=text.n_bytes > 4 * MB):
        rows = text.rows.map(
            _spans if text.arrays else _to_tokens,
            batched=True,
            batch_size=64,
            fn_kwargs={"tokenizer": tokenizer, "dtype": dtype} | ({"paths": text.arrays} if text.arrays else {}),
            remove_columns=text.rows.column_names,
            features=datasets.Features({"tokens": datasets.List(datasets.Value(dtype))}),
            num_proc=num_proc if num_proc > 1 else None,
            cache_file_name=str(folder / "tokens.arrow"),
            load_from_cache_file=False,
            new_fingerprint=folder.stem,
            desc="tokenising",
        )
    lengths = pyarrow.compute.list_value_length(rows.data.column("tokens")).to_numpy()
    return int(lengths[: text.n_train_rows].sum())


def _to_tokens(batch: dict[str, list], tokenizer: Tokenizer, dtype: str) -> dict[str, list[np.ndarray]]:
    """Rows of text as rows of tokens, <|endoftext|> after each document that is not empty."""
    texts = [text or "" for text in batch["text"]]
    ends = batch.get("ends", [True] * len(texts))  # a hub data set's rows are documents
    rows = zip(tokenizer.encode_batch(texts), ends, strict=True)
    return {"tokens": [np.asarray([*ids, tokenizer.eos_id] if ids and end else ids, dtype=dtype) for ids, end in rows]}


def _spans(batch: dict[str, list], tokenizer: Tokenizer, dtype: str, paths: tuple[Path, ...]) -> dict[str, list[np.ndarray]]:
    """Rows that name a part of an array as rows of tokens."""
    rows = zip(batch["file"], batch["start"], batch["stop"], strict=True)
    return {"tokens": [read_span(paths[i], start, stop, tokenizer.vocab_size).astype(dtype) for i, start, stop in rows]}


def _unigram_entropy(tokens: TokenStream, n_train: int, vocab_size: int) -> float:
    """See DataStats."""
    train = tokens.part(0, n_train).counts(vocab_size) + 1
    val = tokens.part(n_train, len(tokens)).counts(vocab_size)
    return float(-(val * np.log(train / train.sum())).sum() / max(1, val.sum()))
