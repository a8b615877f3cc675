"""Reading: exact content, documents, the hub, and one clear line for what cannot be read."""

import gzip
import io
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub.constants
import pytest

from flash_ladder.data import sources
from flash_ladder.data.corpus import open_corpus
from flash_ladder.data.sources import ROW_CHARS, content_hash, stdlib_files
from flash_ladder.schema import DataConfig
from tests.helpers.corpora import END, config, documents, hub_folder, refused, text_of, words_of, write_jsonl, write_txt


def test_text_is_read_exactly(tmp_path):
    texts = ["a\r\nb\rc\n", "\ufeffBOM, 東京 👩‍🚀 \u2028", "no newline at the end", "x" * (3 * ROW_CHARS + 7), f"spelled {END} out"]
    texts += ["".join(f"line {i}\r\n" for i in range(3 * ROW_CHARS // 10))]
    opened = open_corpus(config(tmp_path, write_txt(tmp_path / "text", texts), val_fraction=0.5), seed=0)
    everything = text_of(opened.train, opened.tokenizer) + text_of(opened.val, opened.tokenizer)
    assert len(everything) == sum(map(len, texts)) + len(texts) * len(END)
    assert all(text + END in everything for text in texts)
    assert opened.stats.n_documents == len(texts)
    assert opened.stats.n_bytes == sum(len(text.encode()) for text in texts)
    assert opened.stats.n_train_tokens + opened.stats.n_val_tokens == opened.stats.n_bytes + len(texts)


def test_long_documents_become_short_rows(tmp_path):
    [path] = write_txt(tmp_path / "text", ["x" * (5 * ROW_CHARS)])
    rows = sources.read_files([Path(path)], "text", tmp_path / "arrow")
    assert max(len(row["text"]) for row in rows) <= 2 * ROW_CHARS
    assert [row["ends"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert "".join(row["text"] for row in rows) == "x" * (5 * ROW_CHARS)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_are_documents(tmp_path, ending):
    texts = ["one\r\n", "", None, "two é\nlines", "three"] * 9
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        write_jsonl(path, [{"id": i if i % 2 else str(i), "body": text} for i, text in enumerate(texts)])  # ids of mixed type
        path.write_text(path.read_text() + "\n")  # and an empty line
    else:
        datasets.Dataset.from_dict({"body": texts, "id": list(range(len(texts)))}).to_parquet(str(path))
    opened = open_corpus(config(tmp_path, str(path), text_column="body"), seed=0)
    read = (text_of(opened.train, opened.tokenizer) + text_of(opened.val, opened.tokenizer)).split(END)
    assert Counter(read) == Counter([*filter(None, texts), ""])  # "" is what follows the last <|endoftext|>
    assert opened.stats.n_documents == 27


def test_globs_lists_and_mixed_endings(tmp_path):
    write_txt(tmp_path / "text", documents(5))
    jsonl = write_jsonl(tmp_path / "more.jsonl", [{"text": text} for text in documents(5, seed=1)])
    assert open_corpus(config(tmp_path, [f"{tmp_path}/text/*.txt", jsonl]), seed=0).stats.n_documents == 10


def test_stdlib_is_source_code_without_tests():
    files = stdlib_files()
    names = {str(path) for path in files}
    assert len(files) > 500
    assert any(name.endswith("/json/decoder.py") for name in names)
    assert not any(f"/{folder}/" in name for name in names for folder in ("test", "tests", "site-packages"))
    assert content_hash(files) == content_hash(stdlib_files())


def test_hub(tmp_path):
    opened = open_corpus(hub_folder(tmp_path), seed=0)
    train, val = (text_of(part, opened.tokenizer) for part in (opened.train, opened.val))
    assert (train + val).count(END) == 30  # none for the null
    assert len(words_of(train) | words_of(val)) == 30
    assert not words_of(train) & words_of(val)


def test_hub_without_warnings(tmp_path, monkeypatch, caplog):
    hub = hub_folder(tmp_path)
    hub.num_proc = 4  # more than the one file can use, of which `datasets` would warn
    monkeypatch.setattr(datasets.logging.get_logger(), "handlers", [caplog.handler])
    open_corpus(hub, seed=0)
    assert not caplog.records


# ---- bad inputs ----


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.txt", None, r"no such file; did you mean missin\.txt\?"),
        ("empty.txt", b"", "is empty; leave it out"),
        ("zeros.txt", bytes(100), "is binary"),
        ("image.txt", b"\x89PNG\r\n\x1a\n", "is binary or not UTF-8"),
        ("latin.txt", "café".encode("latin-1"), "not UTF-8"),
        ("late.txt", b"text " * ROW_CHARS + b"\xff", "not UTF-8"),
        ("book.pdf", b"%PDF", r"ends in \.pdf; what can be read is \.txt, \.json, \.jsonl, \.parquet"),
        ("bare", b"text", "ends in nothing"),
        ("rows.parquet", b"PAR0", "not a parquet file"),
        ("no.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"line 2 has no field text; did you mean txt\?"),
        ("broken.jsonl", b'{"text": "a"}\n\n{"text": "b\n', "line 3 is not JSON"),
        ("bytes.jsonl", b'{"text": "\xff"}\n', "line 1 is not JSON"),
        ("list.jsonl", b'["a", "b"]\n', "line 1 is not an object"),
        ("number.jsonl", b'{"text": 5}\n', "line 1: text is int, not text"),
        ("surrogate.jsonl", b'{"text": "\\ud800"}\n', "line 1: text is not valid Unicode"),
        ("table.csv", b"text", r"ends in \.csv; what can be read is"),
        ("rows.jsonl.bz2", b"text", r"ends in \.bz2; what can be read is"),
        ("rows.parquet.gz", b"text", r"ends in \.gz; what can be read is"),
        ("no.json", b'[{"text": "a"}, {"txt": "b"}]', r"entry 2 has no field text; did you mean txt\?"),
        ("half.json", b'[{"text": "a"}, {"te', "half.json is not JSON"),
        ("deep.json", b"[" * 99999, "deep.json is not JSON"),
        ("plain.txt.gz", b"text", "cannot be decompressed .Not a gzipped file"),
        ("half.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99)[:30], "cannot be decompressed"),
        ("none.jsonl", b'{"text": ""}\n{"text": null}\n', "no text"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_bad_file(tmp_path, name, content, message):
    (tmp_path / "missin.txt").write_text("x")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(config(tmp_path, str(tmp_path / name)), message)


def test_the_same_documents_in_every_format(tmp_path):
    texts = ["one\r\n", "", None, "two é\nlines", "three"] * 9
    rows = [{"text": text, "id": i} for i, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "list.json").write_text("\n " + json.dumps(rows, indent=1))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json.GZ").write_bytes(gzip.compress(json.dumps(rows).encode()))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "d.parquet"))
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    read = {
        path.name: [
            row["text"] for row in sources.read_files(sources.user_files([str(path)]), "text", tmp_path / f"cache {path.name}")
        ]
        for path in [*tmp_path.iterdir()]
    }
    assert len(read) == 7 and all(found == [text for text in texts if text] for found in read.values())
    assert content_hash([tmp_path / "saved"]) != content_hash([tmp_path / "d.parquet"])


def test_compressed_text_is_read_exactly(tmp_path, monkeypatch):
    text = "a\r\nb\rc\n é" * 9
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert [row["text"] for row in sources.read_files([tmp_path / "a.txt.gz"], "text", tmp_path / "cache")] == [text]
    (tmp_path / "b.txt.zst").write_bytes(b"zst")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    refused(config(tmp_path, str(tmp_path / "b.txt.zst")), "not installed: pip install zstandard")
    monkeypatch.setitem(sys.modules, "zstandard", SimpleNamespace(open=lambda path, mode: io.BytesIO(text.encode())))
    assert [row["text"] for row in sources.read_files([tmp_path / "b.txt.zst"], "text", tmp_path / "cache2")] == [text]


def test_a_saved_data_set_of_several_splits_or_a_damaged_one_is_named(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "saved"))
    refused(config(tmp_path, str(tmp_path / "saved")), r"several splits \(test, train\); name one, as in data\.files=.*saved/SPLIT")
    refused(config(tmp_path, str(tmp_path / "saved" / "train"), text_column="body"), "has no field body; it has text")
    (tmp_path / "saved" / "train" / "state.json").write_text("{}")
    refused(config(tmp_path, str(tmp_path / "saved" / "train")), "is no data set of save_to_disk, or a damaged one")


def test_folder_and_glob_without_a_match(tmp_path):
    refused(config(tmp_path, str(tmp_path)), r"is a folder; name its files, as in data\.files='.*/\*\.txt'")
    refused(config(tmp_path, f"{tmp_path}/*.txt"), "no such file")


def test_parquet_without_the_column(tmp_path):
    datasets.Dataset.from_dict({"body": ["a"]}).to_parquet(str(tmp_path / "rows.parquet"))
    refused(config(tmp_path, str(tmp_path / "rows.parquet")), "has no field text; it has body")


def test_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused(config(tmp_path, None, hub_name="owner/not-downloaded"), "the hub cannot be reached")


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_hub_choices(tmp_path, streaming):
    hub = hub_folder(tmp_path)
    hub.streaming = streaming
    for change, message in [
        ({"hub_split": "trian"}, "cannot be loaded: .*train"),
        ({"text_column": "txt"}, r"has no field txt; did you mean text\?"),
        ({"text_column": "id"}, "id is .*, not text"),
        ({"hub_name": hub.hub_name + "s"}, "cannot be loaded"),
    ]:
        refused(DataConfig(**{**vars(hub), **change}), message)


def test_hub_without_text(tmp_path):
    datasets.Dataset.from_dict({"text": ["", None, ""]}).to_parquet(str(tmp_path / "train.parquet"))
    refused(config(tmp_path, None, hub_name=str(tmp_path)), "no text")


def test_stream_that_is_too_short(tmp_path):
    hub = hub_folder(tmp_path)
    hub.streaming = True
    refused(hub, r"less text than a stream holds out for validation \(16 MB\); set data\.streaming=false")
