"""The sources of text: Python's standard library, the user's files, or a data set on the Hugging Face hub.

Each source has a fingerprint of its content and can be read as rows of {"text": str, "ends": bool}. A document is one or more rows:
local files are cut about every ROW_CHARS characters, so that one huge file costs no more memory than many small ones and several
processes can tokenise it. `ends` marks a document's last row.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import datasets
import huggingface_hub.utils
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from flash_ladder.data import arrays
from flash_ladder.errors import UserError, first_line, nearest
from flash_ladder.schema import DataConfig

ROW_CHARS = 1 << 16
ROW = datasets.Features({"text": datasets.Value("string"), "ends": datasets.Value("bool")})
ENDINGS = (".txt", ".json", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst")  # which txt, json and jsonl may be, as in .jsonl.gz


def digest(*parts: Any) -> str:
    """16 hex digits that identify the values `parts` (by their repr)."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@contextmanager
def quiet(progress: bool) -> Iterator[None]:
    """A context in which `datasets` and the hub's client print no warnings, and draw progress bars only with `progress`."""
    logs = (datasets.logging, huggingface_hub.utils.logging)
    before = [log.get_verbosity() for log in logs]
    hide = not progress and not datasets.are_progress_bars_disabled()
    for log in logs:
        log.set_verbosity(log.CRITICAL)
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.set_verbosity(level)
        if hide:
            datasets.enable_progress_bars()


# ---- local files ----


def stdlib_files() -> list[Path]:
    """The .py files of this Python's standard library, in a fixed order; no tests, installed packages or undecodable files."""
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return [path for path in found if _is_text(path)]


def user_files(patterns: list[str], key: str = "data.files") -> list[Path]:
    """The files that paths and globs name, in the order given, a glob's sorted by name; a folder only of `save_to_disk`.

    Raises UserError, which names the `key`, for a file that is missing, empty, unreadable, another folder, or of another format.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        found = [path] if os.path.exists(path) else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not found:
            siblings = os.listdir(path.parent) if os.path.isdir(path.parent) else []
            several = "" if "," not in path.name else f"; several files are a list, {key}=[a.txt,b.txt]"
            raise UserError(f"{key}={pattern}: no such file{nearest(path.name, siblings) or several}")
        files += [p for p in found if p not in files]
    for path in files:
        if path.is_dir():
            if (path / "state.json").is_file():  # of Dataset.save_to_disk
                continue
            if (path / "dataset_dict.json").is_file():
                splits = ", ".join(sorted(folder.name for folder in path.iterdir() if folder.is_dir()))
                raise UserError(f"{key}: {path} is a data set of several splits ({splits}); name one, as in {key}={path}/SPLIT")
            raise UserError(f"{key}: {path} is a folder; name its files, as in {key}='{path}/*.txt'")
        if kind(path) not in (*ENDINGS, *arrays.ENDINGS) or (path.suffix.lower() in COMPRESSED and kind(path) not in ENDINGS[:3]):
            raise UserError(
                f"{key}: {path} ends in {path.suffix or 'nothing'}; what can be read is {', '.join(ENDINGS + arrays.ENDINGS)}, "
                f"and {' and '.join(COMPRESSED)} of the first three"
            )
        if not os.access(path, os.R_OK):
            raise UserError(f"{key}: {path} cannot be read (permission denied)")
        if path.stat().st_size == 0:
            raise UserError(f"{key}: {path} is empty; leave it out")
    return files


def kind(path: Path) -> str:
    """The ending that says what a file holds: .jsonl of a.jsonl.gz; "/" of a folder."""
    if path.is_dir():
        return "/"
    ending = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if ending in COMPRESSED else ending


def _parts(path: Path) -> list[Path]:
    """The files whose bytes are a data file's."""
    return sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]


def content_hash(files: list[Path]) -> str:
    """16 hex digits that depend on every byte of `files`, their order and their endings, but not on their folders."""
    total = hashlib.blake2b(digest_size=8)
    with tqdm(desc="checking the files", total=_size(files), unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for path in files:
            one = hashlib.blake2b(path.suffix.lower().encode(), digest_size=16)
            for part in _parts(path):
                with part.open("rb") as file:
                    while block := file.read(1 << 20):
                        one.update(block)
                        bar.update(len(block))
            total.update(one.digest())
    return total.hexdigest()


def read_files(files: list[Path], text_column: str, cache_dir: Path) -> datasets.Dataset:
    """Returns the rows of `files` (ROW), memory-mapped from an Arrow file under `cache_dir`.

    txt (and py): a file is a document. The others: a row is a document, with its text in `text_column`. Rows without text
    (null or "") are no documents. Nothing is altered. Line ends stay as they are, unlike in `load_dataset("text")`. In jsonl only
    the text column matters, unlike in `load_dataset("json")`.
    Raises UserError for a file that is not what its ending says; for jsonl it names the line.
    """
    arguments = {"files": tuple(map(str, files)), "text_column": text_column}
    try:
        with quiet(progress=_size(files) > 256 << 20):  # reading is fast: a bar only where it takes seconds
            return datasets.Dataset.from_generator(_rows, features=ROW, gen_kwargs=arguments, cache_dir=str(cache_dir))
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _size(files: list[Path]) -> int:
    return sum(part.stat().st_size for path in files for part in _parts(path))


def _rows(files: tuple[str, ...], text_column: str) -> Iterator[dict]:
    rows = itertools.chain.from_iterable(_file_rows(Path(path), text_column) for path in files)
    first = next(rows, None)
    if first is None:
        raise UserError("the data holds no text: every document is empty")
    yield first
    yield from rows


def _uncompressed_rows(path: Path, text_column: str) -> Iterator[dict]:
    readers = {".json": _json_documents, ".jsonl": _jsonl_documents, ".parquet": _parquet_documents, "/": _saved_documents}
    read = readers.get(kind(path))
    if read is None:
        yield from _text_rows(path)
    else:
        for text in read(path, text_column):
            yield from _cut(io.StringIO(text))


def _file_rows(path: Path, text_column: str) -> Iterator[dict]:
    try:
        yield from _uncompressed_rows(path, text_column)
    except Exception as error:  # of a decompressor; everything else is said where it happens
        if isinstance(error, UserError) or path.suffix.lower() not in COMPRESSED:
            raise
        raise UserError(f"{path} cannot be decompressed ({first_line(error)}); copy it again") from None


def _cut(document: TextIO) -> Iterator[dict]:
    """A document of any length as rows, cut at line ends where there are any. An empty document has no rows."""

    def next_row() -> str:
        return document.read(ROW_CHARS) + document.readline(ROW_CHARS)

    row = next_row()
    while row:
        following = next_row()
        yield {"text": row, "ends": not following}
        row = following


def _text_rows(path: Path) -> Iterator[dict]:
    with io.TextIOWrapper(_opened(path), encoding="utf-8", newline="") as file:
        try:
            for row in _cut(file):
                if "\0" in row["text"]:
                    raise UserError(f"{path} is binary (it holds NUL bytes); data files are UTF-8 text")
                yield row
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is binary or not UTF-8 ({error.reason}); convert it with iconv -t UTF-8") from None


def _opened(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed where its ending says so."""
    ending = path.suffix.lower()
    if ending == ".gz":
        return cast("BinaryIO", gzip.open(path, "rb"))
    if ending == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path}: reading .zst needs a package that is not installed: pip install zstandard") from None
        return zstandard.open(path, "rb")
    return path.open("rb")


def _json_documents(path: Path, column: str) -> Iterator[str]:
    """A file that is one list of objects; one that has an object a line is read as jsonl."""
    with _opened(path) as file:
        if not file.read(1 << 16).lstrip().startswith(b"["):
            yield from _jsonl_documents(path, column)
            return
    with _opened(path) as file:
        try:
            rows = json.load(file, parse_int=len)  # see jsonl
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({first_line(error)})") from None
    for number, row in enumerate(rows, start=1):
        yield _field(row, f"{path}, entry {number}", column)


def _field(row: Any, where: str, column: str) -> str:
    """The text of an object. Raises UserError for what is none, or has no text."""
    if not isinstance(row, dict):
        raise UserError(f'{where} is not an object, as in {{"{column}": "..."}}')
    if column not in row:
        raise _no_column(where, column, list(row))
    return _checked(row[column], where, column)


def _saved_documents(path: Path, column: str) -> Iterator[str]:
    """A folder of Dataset.save_to_disk."""
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is no data set of save_to_disk, or a damaged one ({first_line(error)})") from None
    if column not in dataset.column_names:
        raise _no_column(str(path), column, dataset.column_names)
    for row in dataset.select_columns([column]):
        yield _checked(row[column], str(path), column)


def _jsonl_documents(path: Path, column: str) -> Iterator[str]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line, parse_int=len)  # of numbers the type alone counts, and Python reads no very long ones
            except ValueError as error:
                raise UserError(f"{where} is not JSON ({error}); jsonl has one object a line") from None
            except RecursionError:
                raise UserError(f"{where} has too many brackets in brackets to be read; leave the field with them out") from None
            yield _field(row, where, column)


def _parquet_documents(path: Path, column: str) -> Iterator[str]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _no_column(str(path), column, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1000, columns=[column]):
                for text in batch.column(0).to_pylist():
                    yield _checked(text, str(path), column)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file, or a damaged one ({str(error).splitlines()[0]})") from None


def _checked(text: Any, where: str, column: str) -> str:
    """A text column's value as a document; null is an empty one. Raises UserError for a value that is no text."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: {column} is {type(text).__name__}, not text; set data.text_column=NAME")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: {column} is not valid Unicode ({error.reason})") from None
    return text


def _no_column(where: str, column: str, columns: list[str]) -> UserError:
    hint = nearest(column, columns) or f"; it has {', '.join(columns) or 'none'}"
    return UserError(f"{where} has no field {column}{hint} (data.text_column=NAME)")


def _is_text(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return False
    return True


# ---- the hub ----


def open_hub(cfg: DataConfig) -> datasets.Dataset | datasets.IterableDataset:
    """Returns the data set `cfg` names with one column, `text`: downloaded and memory-mapped, or a stream with `cfg.streaming`.

    An earlier download is used again, also offline. Raises UserError where the hub cannot be reached and for a name,
    configuration, split or column that does not exist.
    """
    name = f"data.hub_name={cfg.hub_name}"
    arrow_cache = str(Path(cfg.cache_dir).expanduser() / "hub") if cfg.cache_dir else None  # None: the shared default
    num_proc = None if cfg.streaming else cfg.num_proc
    try:
        with quiet(progress=True):
            dataset = datasets.load_dataset(
                cfg.hub_name, cfg.hub_config, split=cfg.hub_split, streaming=cfg.streaming, cache_dir=arrow_cache, num_proc=num_proc
            )
    except ConnectionError as error:
        raise UserError(f"{name}: the hub cannot be reached ({error}); data=text reads local files") from None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{name} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    columns = dataset.column_names or list(next(iter(dataset.take(1)), {}))  # a stream may learn its columns from its first row
    if cfg.text_column not in columns:
        raise _no_column(name, cfg.text_column, columns)
    kind = dataset.features[cfg.text_column] if dataset.features else datasets.Value("string")
    if kind not in (datasets.Value("string"), datasets.Value("large_string")):
        raise UserError(f"{name}: {cfg.text_column} is {kind}, not text; set data.text_column=NAME")
    dataset = dataset.select_columns([cfg.text_column])
    return dataset if cfg.text_column == "text" else dataset.rename_column(cfg.text_column, "text")


def hub_fingerprint(cfg: DataConfig, dataset: datasets.Dataset | datasets.IterableDataset) -> str:
    """16 hex digits for a hub data set: its name and, once downloaded, its revision (in its Arrow files' paths) and its length."""
    revision = None if cfg.streaming else (sorted(file["filename"] for file in dataset.cache_files), len(dataset))
    return digest(cfg.hub_name, cfg.hub_config, cfg.hub_split, cfg.text_column, cfg.streaming, revision)
