"""From rows of text to one stream of tokens on disk, which is built once and kept in a cache.

A cache entry is a folder: tokens*.arrow (one list of token ids a row, training documents first, then the validation ones),
tokenizer.json and corpus.json. Its name is a fingerprint of everything that decides its content. It is built under another name and
renamed when complete, by one process while the others wait.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
from filelock import FileLock

from flash_ladder.data.sources import content_hash, digest, hub_fingerprint, open_hub, quiet, read_files, stdlib_files, user_files
from flash_ladder.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from flash_ladder.errors import UserError
from flash_ladder.files import make_writable
from flash_ladder.schema import DataConfig

FORMAT = 1  # of a cache entry; part of its name
MB = 1 << 20
BPE_BYTES_PER_TOKEN = 2048  # a BPE of V tokens is trained on about V times this many bytes: more take time and hardly change it
STREAM_VALIDATION_BYTES = 16 * MB  # size of a stream's first documents, which are held out


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
    """A cache entry, opened. Of a stream, `val` is the first `n_held_out` rows and `train` only the tokenizer's sample."""

    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream
    stats: DataStats
    n_held_out: int


def open_corpus(cfg: DataConfig, seed: int) -> Corpus:
    """Opens the cache entry for `cfg`, building it if this is the first time. `seed` decides which documents are held out.

    Any number of processes may call it at once. Raises UserError for data that cannot be used and a cache that cannot be written.
    """
    if cfg.source == "hub":
        files, hub = [], open_hub(cfg)
        fingerprint = hub_fingerprint(cfg, hub)
    else:
        files, hub = stdlib_files() if cfg.source == "stdlib" else user_files(cfg.paths()), None
        fingerprint = digest(content_hash(files), cfg.text_column)
    vocab_size = cfg.vocab_size if cfg.tokenizer == "bpe" else None
    val_fraction = None if cfg.streaming else cfg.val_fraction
    key = digest(FORMAT, fingerprint, cfg.tokenizer, vocab_size, seed, val_fraction)

    def build(folder: Path) -> None:
        if cfg.streaming:
            text = _text_of_stream(hub, cfg)
        elif cfg.source == "hub":
            text = _text_of_rows(hub, cfg, seed)
        else:
            text = _text_of_rows(read_files(files, cfg.text_column, folder / "text"), cfg, seed)
        _write(folder, text, cfg, seed, fingerprint)
        shutil.rmtree(folder / "text", ignore_errors=True)

    entry = _cached(Path(cfg.cache_dir or "~/.cache/flash_ladder").expanduser(), key, build)
    try:
        return _read(entry)
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise UserError(f"the data cache {entry} is damaged ({error}); delete that folder and it is built again") from None


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
    saved = json.loads((entry / "corpus.json").read_text())
    tokens, n_train = TokenStream(_token_files(entry)), saved["n_train_tokens"]
    train, val = tokens.part(0, n_train), tokens.part(n_train, len(tokens))
    return Corpus(Tokenizer.load(entry), train, val, DataStats(**saved["stats"]), saved["n_held_out"])


def _token_files(entry: Path) -> list[Path]:
    return sorted(entry.glob("tokens*.arrow"))  # one per process that tokenised, in the order of the rows


# ---- the text to tokenise ----


@dataclass(frozen=True)
class _Text:
    """Rows of text: the first `n_train_rows` are for training, the rest for validation."""

    rows: datasets.Dataset
    n_train_rows: int
    n_bytes: int
    n_documents: int
    split: str
    n_held_out: int = 0  # rows of a stream


def _text_of_rows(rows: datasets.Dataset, cfg: DataConfig, seed: int) -> _Text:
    """All the rows. Documents are held out by `seed`; a lone document is cut in two instead."""
    sizes = pyarrow.compute.binary_length(rows.data.column("text")).fill_null(0).to_numpy()
    if sizes.sum() == 0:
        raise UserError("the data holds no text: every document is empty")
    ends = rows.data.column("ends").to_numpy() if "ends" in rows.column_names else np.ones(len(rows), dtype=bool)
    n_documents, n_bytes = int(ends.sum()), int(sizes.sum())
    if n_documents == 1:
        rows, n_train_rows = _split_by_position(rows, sizes, cfg.val_fraction)
        return _Text(rows, n_train_rows, n_bytes, 1, "by position: there is one document, and its last part is held out")
    order, n_train_rows = _split_by_document(ends, cfg.val_fraction, seed)
    return _Text(rows.select(order), n_train_rows, n_bytes, n_documents, "by document")


def _split_by_document(ends: np.ndarray, val_fraction: float, seed: int) -> tuple[np.ndarray, int]:
    """Returns an order of the rows, training documents first, and how many rows those have.

    Documents are shuffled, so that the first few held-out ones are a fair sample and the tokenising processes get equal shares.
    """
    n = int(ends.sum())
    n_train = n - min(n - 1, max(1, round(n * val_fraction)))
    place = np.random.default_rng(seed).permutation(n)  # one for each document
    place_of_row = place[np.cumsum(ends) - ends]
    return np.argsort(place_of_row, kind="stable"), int((place_of_row < n_train).sum())


def _split_by_position(rows: datasets.Dataset, sizes: np.ndarray, val_fraction: float) -> tuple[datasets.Dataset, int]:
    """Cuts a lone document in two; returns the rows, and how many belong to the first document. `sizes` are bytes per row."""
    n, position = len(rows), (1 - val_fraction) * sizes.sum()
    row = int(np.searchsorted(np.cumsum(sizes), position))  # the row to cut
    text = rows[row]["text"]
    cut = round(len(text) * (position - sizes[:row].sum()) / sizes[row])
    features = datasets.Features({**rows.features, "ends": datasets.Value("bool")})
    halves = datasets.Dataset.from_dict({"text": [text[:cut], text[cut:]], "ends": [True, row == n - 1]}, features=features)
    return datasets.concatenate_datasets([rows, halves]).select(np.r_[:row, n, n + 1, row + 1 : n]), row + 1


def _text_of_stream(stream: datasets.IterableDataset, cfg: DataConfig) -> _Text:
    """A stream's beginning: the documents to hold out, then a sample of the training documents for the tokenizer."""
    rows = iter(stream)
    held_out = _take(rows, STREAM_VALIDATION_BYTES)
    sample = _take(rows, max(STREAM_VALIDATION_BYTES, BPE_BYTES_PER_TOKEN * cfg.vocab_size))
    if not sample:
        raise UserError(
            f"data.hub_name={cfg.hub_name} has less text than a stream holds out for validation "
            f"({STREAM_VALIDATION_BYTES // MB} MB); set data.streaming=false"
        )
    texts = sample + held_out
    return _Text(
        rows=datasets.Dataset.from_dict({"text": texts}),
        n_train_rows=len(sample),
        n_bytes=sum(map(len, texts)),
        n_documents=len(texts),
        split=f"the stream's first {len(held_out)} documents",
        n_held_out=len(held_out),
    )


def _take(rows: Iterator[dict], n_bytes: int) -> list[str]:
    """The texts of the next rows, up to `n_bytes` of them."""
    texts, size = [], 0
    while size < n_bytes and (row := next(rows, None)) is not None:
        texts.append(row["text"] or "")
        size += len(texts[-1].encode())
    return texts


# ---- tokens ----


def _write(folder: Path, text: _Text, cfg: DataConfig, seed: int, fingerprint: str) -> None:
    """Writes a cache entry's files into `folder`."""
    tokenizer = byte_tokenizer() if cfg.tokenizer == "bytes" else _trained_bpe(text, cfg.vocab_size, seed)
    tokenizer.save(folder)
    n_train_tokens = _tokenise(folder, text, tokenizer, cfg.num_proc)

    tokens = TokenStream(_token_files(folder))
    n_val_tokens = len(tokens) - n_train_tokens
    stats = DataStats(
        n_documents=None if cfg.streaming else text.n_documents,
        n_bytes=None if cfg.streaming else text.n_bytes,
        n_train_tokens=None if cfg.streaming else n_train_tokens,
        n_val_tokens=n_val_tokens,
        unigram_entropy=_unigram_entropy(tokens, n_train_tokens, tokenizer.vocab_size),
        corpus=fingerprint,
        split=text.split,
    )
    saved = {"n_train_tokens": n_train_tokens, "n_held_out": text.n_held_out, "stats": asdict(stats)}
    (folder / "corpus.json").write_text(json.dumps(saved, indent=1))


def _trained_bpe(text: _Text, vocab_size: int, seed: int) -> Tokenizer:
    """A BPE trained on a random sample of the training rows (all of them where they are few)."""
    wanted = min(text.n_bytes, BPE_BYTES_PER_TOKEN * vocab_size)
    n_rows = math.ceil(len(text.rows) * wanted / text.n_bytes)
    sample = np.sort(np.random.default_rng(seed).permutation(text.n_train_rows)[:n_rows])
    batches = text.rows.select(sample).iter(batch_size=100)
    texts = (row for batch in batches for row in batch["text"] if row)
    return train_bpe(texts, vocab_size, show_progress=wanted > 16 * MB)


def _tokenise(folder: Path, text: _Text, tokenizer: Tokenizer, num_proc: int) -> int:
    """Writes folder/tokens*.arrow, a row of tokens for each row of text, and returns the number of training tokens."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    num_proc = min(num_proc, len(text.rows), text.n_bytes // MB)  # a process costs about as much as a megabyte
    with quiet(progress=text.n_bytes > 4 * MB):
        rows = text.rows.map(
            _to_tokens,
            batched=True,
            batch_size=64,
            fn_kwargs={"tokenizer": tokenizer, "dtype": dtype},
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


def _unigram_entropy(tokens: TokenStream, n_train: int, vocab_size: int) -> float:
    """See DataStats."""
    train = tokens.part(0, n_train).counts(vocab_size) + 1
    val = tokens.part(n_train, len(tokens)).counts(vocab_size)
    return float(-(val * np.log(train / train.sum())).sum() / max(1, val.sum()))
