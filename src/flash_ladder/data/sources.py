"""The sources of text: Python's standard library, the user's files, or a data set on the Hugging Face hub.

Each source has a fingerprint of its content and can be read as rows of {"text": str, "ends": bool}. A document is one or more rows:
local files are cut about every ROW_CHARS characters, so that one huge file costs no more memory than many small ones and several
processes can tokenise it. `ends` marks a document's last row.
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import json
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import datasets
import huggingface_hub.utils
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from flash_ladder.errors import UserError, nearest
from flash_ladder.schema import DataConfig

ROW_CHARS = 1 << 16
ROW = datasets.Features({"text": datasets.Value("string"), "ends": datasets.Value("bool")})
ENDINGS = (".txt", ".jsonl", ".parquet")


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


def user_files(patterns: list[str]) -> list[Path]:
    """The files that paths and globs name, in the order given, a glob's sorted by name.

    Raises UserError for a file that is missing, empty, unreadable, a folder, or ends in anything but txt, jsonl and parquet.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        found = [path] if os.path.exists(path) else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not found:
            siblings = os.listdir(path.parent) if os.path.isdir(path.parent) else []
            several = "" if "," not in path.name else "; several files are a list, data.files=[a.txt,b.txt]"
            raise UserError(f"data.files={pattern}: no such file{nearest(path.name, siblings) or several}")
        files += [p for p in found if p not in files]
    for path in files:
        if path.is_dir():
            raise UserError(f"data.files: {path} is a folder; name its files, as in data.files='{path}/*.txt'")
        if path.suffix.lower() not in ENDINGS:
            raise UserError(f"data.files: {path} ends in {path.suffix or 'nothing'}; what can be read is {', '.join(ENDINGS)}")
        if not os.access(path, os.R_OK):
            raise UserError(f"data.files: {path} cannot be read (permission denied)")
        if path.stat().st_size == 0:
            raise UserError(f"data.files: {path} is empty; leave it out")
    return files


def content_hash(files: list[Path]) -> str:
    """16 hex digits that depend on every byte of `files`, their order and their endings, but not on their folders."""
    total = hashlib.blake2b(digest_size=8)
    with tqdm(desc="checking the files", total=_size(files), unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for path in files:
            one = hashlib.blake2b(path.suffix.lower().encode(), digest_size=16)
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    one.update(block)
                    bar.update(len(block))
            total.update(one.digest())
    return total.hexdigest()


def read_files(files: list[Path], text_column: str, cache_dir: Path) -> datasets.Dataset:
    """Returns the rows of `files` (ROW), memory-mapped from an Arrow file under `cache_dir`.

    txt (and py): a file is a document. jsonl and parquet: a row is a document, with its text in `text_column`. Rows without text
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
    return sum(path.stat().st_size for path in files)


def _rows(files: tuple[str, ...], text_column: str) -> Iterator[dict]:
    rows = itertools.chain.from_iterable(_file_rows(Path(path), text_column) for path in files)
    first = next(rows, None)
    if first is None:
        raise UserError("the data holds no text: every document is empty")
    yield first
    yield from rows


def _file_rows(path: Path, text_column: str) -> Iterator[dict]:
    read = {".jsonl": _jsonl_documents, ".parquet": _parquet_documents}.get(path.suffix.lower())
    if read is None:
        yield from _text_rows(path)
    else:
        for text in read(path, text_column):
            yield from _cut(io.StringIO(text))


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
    with path.open(encoding="utf-8", newline="") as file:
        try:
            for row in _cut(file):
                if "\0" in row["text"]:
                    raise UserError(f"{path} is binary (it holds NUL bytes); data files are UTF-8 text")
                yield row
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is binary or not UTF-8 ({error.reason}); convert it with iconv -t UTF-8") from None


def _jsonl_documents(path: Path, column: str) -> Iterator[str]:
    with path.open("rb") as file:
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
            if not isinstance(row, dict):
                raise UserError(f'{where} is not an object; jsonl has one a line, as in {{"{column}": "..."}}')
            if column not in row:
                raise _no_column(where, column, list(row))
            yield _checked(row[column], where, column)


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
