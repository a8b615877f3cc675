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
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import xxhash
from filelock import FileLock
from tqdm import tqdm

from flash_ladder.data.sources import content_hash, digest, hub_fingerprint, open_hub, quiet, read_files, stdlib_files, user_files
from flash_ladder.data.tokenizer import FILE as TOKENIZER
from flash_ladder.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from flash_ladder.errors import UserError, first_line
from flash_ladder.files import checksum, is_sealed, make_writable, write_json
from flash_ladder.schema import DataConfig

FORMAT = 2  # of a cache entry; part of its name
MB = 1 << 20
BPE_BYTES_PER_TOKEN = 2048  # a BPE of V tokens is trained on about V times this many bytes: more take time and hardly change it
STATS = "corpus.json"
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
    """Opens the cache entry for `cfg`, building it if this is the first time. `seed`: the run's, where cfg.split_seed is None.

    Any number of processes may call it at once. Raises UserError for data that cannot be used and a cache that cannot be written.
    """
    if cfg.source == "hub":
        files, hub = [], open_hub(cfg)
        fingerprint = hub_fingerprint(cfg, hub)
        if cfg.streaming and cfg.split_seed is not None:  # its beginning tells whether the cache holds the text that it holds out
            fingerprint = digest(fingerprint, _take(iter(hub), STREAM_VALIDATION_BYTES))
    else:
        files, hub = stdlib_files() if cfg.source == "stdlib" else user_files(cfg.paths()), None
        fingerprint = digest(content_hash(files), cfg.text_column)
    vocab_size = cfg.vocab_size if cfg.tokenizer == "bpe" else None
    val_fraction = None if cfg.streaming else cfg.val_fraction
    seed = seed if cfg.split_seed is None else cfg.split_seed
    key = digest(FORMAT, fingerprint, cfg.tokenizer, vocab_size, seed, cfg.split_seed is None, val_fraction)

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
    """All the rows, with those of the documents that `seed` holds out at the end; or else the last part of the text is held out."""
    sizes = pyarrow.compute.binary_length(rows.data.column("text")).fill_null(0).to_numpy()
    if sizes.sum() == 0:
        raise UserError("the data holds no text: every document is empty")
    if "ends" not in rows.column_names:  # a hub data set's rows are documents
        rows = rows.add_column("ends", np.ones(len(rows), dtype=bool))
    ends = rows.data.column("ends").to_numpy()
    document = np.cumsum(ends) - ends  # of each row
    n_documents, n_bytes = int(ends.sum()), int(sizes.sum())
    place = np.random.default_rng(seed).permutation(n_documents)  # of each document, in a random order
    if cfg.split_seed is None:
        n_held_out = min(n_documents - 1, max(1, round(n_documents * cfg.val_fraction)))
        is_held_out = place >= n_documents - n_held_out
    else:
        is_held_out = _held_out(np.bincount(document, weights=sizes).astype(np.int64), place, cfg.val_fraction)
    if not is_held_out.any():
        rows, n_train_rows = _split_by_position(rows, sizes, cfg.val_fraction)
        split = "by position: the last part of the text, whose documents are too few or too large to be held out whole"
        return _Text(rows, n_train_rows, n_bytes, n_documents, split)
    # Shuffled, so that the first few held-out documents are a fair sample and the tokenising processes get equal shares.
    order = np.lexsort((place[document], is_held_out[document]))
    return _Text(rows.select(order), int((~is_held_out[document]).sum()), n_bytes, n_documents, "by document")


def _held_out(sizes: np.ndarray, place: np.ndarray, val_fraction: float) -> np.ndarray:
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
    files = {path.name: checksum(path, xxhash.xxh3_128) for path in [*_token_files(folder), folder / TOKENIZER]}
    saved = {"n_train_tokens": n_train_tokens, "n_held_out": text.n_held_out, "stats": asdict(stats), "files": files}
    write_json(folder / STATS, saved, sealed=True)


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
