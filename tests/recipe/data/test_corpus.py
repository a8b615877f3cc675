"""Tokens on disk: the split, the stream of tokens, and a cache that many processes share and any of them may die in."""

import multiprocessing
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from flash_ladder.data import corpus
from flash_ladder.data.corpus import TokenStream, open_corpus
from flash_ladder.data.sources import ROW_CHARS
from flash_ladder.data.tokenizer import Tokenizer, byte_tokenizer
from flash_ladder.errors import UserError
from flash_ladder.schema import DataConfig
from tests.helpers.corpora import END, config, documents, hub_folder, refused, text_of, twenty_documents, words_of, write_txt


@pytest.fixture
def twenty(tmp_path) -> DataConfig:
    return twenty_documents(tmp_path)


# ---- the split ----


def test_split_by_document(twenty):
    opened = open_corpus(twenty, seed=0)
    train, val = (words_of(text_of(part, opened.tokenizer)) for part in (opened.train, opened.val))
    assert (len(train), len(val)) == (16, 4)
    assert not train & val
    assert opened.stats.split == "by document"
    assert text_of(open_corpus(twenty, seed=0).val, opened.tokenizer) == text_of(opened.val, opened.tokenizer)
    assert words_of(text_of(open_corpus(twenty, seed=1).val, opened.tokenizer)) == val  # whatever the run's seed
    assert words_of(text_of(open_corpus(replace(twenty, split_seed=1), seed=0).val, opened.tokenizer)) != val


def test_without_a_split_seed_the_runs_seed_draws_a_share_of_the_documents(tmp_path):
    """As in runs from before data.split_seed, which go on with the split that they have."""
    texts = [*documents(9), "long " * 5000]
    cfg = config(tmp_path, write_txt(tmp_path / "text", texts), split_seed=None, val_fraction=0.1)
    held_out = {}
    for seed in range(9):
        opened = open_corpus(cfg, seed)
        [held_out[seed]] = words_of(text_of(opened.val, opened.tokenizer)) - {""}
    assert len({*held_out.values()}) > 2
    order = np.random.default_rng(3).permutation(10)
    assert held_out[3] == f"d{np.flatnonzero(order == 9)[0]}"


def test_one_of_two_documents_is_held_out_where_it_is_the_share(tmp_path):
    files = write_txt(tmp_path / "text", documents(2))
    opened = open_corpus(config(tmp_path, files, val_fraction=0.5), seed=0)
    parts = [words_of(text_of(part, opened.tokenizer)) for part in (opened.train, opened.val)]
    assert sorted(parts, key=min) == [{"d0"}, {"d1"}]
    assert "by position" in open_corpus(config(tmp_path, files, val_fraction=0.01), seed=0).stats.split


@pytest.mark.parametrize("split_seed", range(4))
@pytest.mark.parametrize(
    "sizes", [[500_000, 8_000], [100_000, 100_000, 10], [50_000, *[400] * 50], [*range(10, 3000, 30)], [7000] * 30]
)
def test_the_share_that_is_held_out_is_of_the_text(tmp_path, sizes, split_seed):
    texts = [chr(97 + i % 26) * size for i, size in enumerate(sizes)]
    cfg = config(tmp_path, write_txt(tmp_path / "text", texts), split_seed=split_seed, val_fraction=0.05)
    stats = open_corpus(cfg, seed=0).stats
    assert 0.02 * sum(sizes) < stats.n_val_tokens < 0.085 * sum(sizes)
    assert stats.n_train_tokens + stats.n_val_tokens == sum(sizes) + len(sizes) + stats.split.startswith("by position")


def test_rows_of_a_hub_data_set_are_cut_by_position_too(tmp_path):
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    texts = ["a" * 5000, "b" * 5000, "c" * 10]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(str(folder / "train.parquet"))
    opened = open_corpus(config(tmp_path, None, hub_name=str(folder), val_fraction=0.05), seed=0)
    train, val = (text_of(part, opened.tokenizer).split(END)[:-1] for part in (opened.train, opened.val))
    assert (train[0], train[1] + val[0], val[1], opened.stats.n_documents) == (*texts, 3)


@pytest.mark.parametrize("length", [1000, 5 * ROW_CHARS])
def test_one_document_is_split_by_position(tmp_path, length):
    text = "".join(random.Random(0).choices("abcde \n", k=length))
    [path] = write_txt(tmp_path / "text", [text])
    opened = open_corpus(config(tmp_path, path, val_fraction=0.1), seed=0)
    train, val = (text_of(part, opened.tokenizer).removesuffix(END) for part in (opened.train, opened.val))
    assert train + val == text
    assert len(val) == pytest.approx(0.1 * length, abs=2)
    assert opened.stats.n_documents == 1
    assert "by position" in opened.stats.split


def test_bpe_is_trained_on_the_training_part_only(tmp_path):
    files = write_txt(tmp_path / "text", [f"{'unseen' if i == 3 else 'common'} " * 50 for i in range(4)])
    for seed in range(99):
        cfg = config(tmp_path, files, tokenizer="bpe", vocab_size=270, split_seed=seed, val_fraction=0.25)
        opened = open_corpus(cfg, seed=0)
        if "unseen" in text_of(opened.val, opened.tokenizer):
            break
    assert len(opened.tokenizer.encode(" common")) == 1
    assert len(opened.tokenizer.encode(" unseen")) > 1


def test_unigram_entropy(twenty):
    opened = open_corpus(twenty, seed=0)
    train, val = (part.read(0, len(part)).tolist() for part in (opened.train, opened.val))
    counts, vocab_size = Counter(train), opened.tokenizer.vocab_size
    expected = -np.mean([np.log((counts[token] + 1) / (len(train) + vocab_size)) for token in val])
    assert opened.stats.unigram_entropy == pytest.approx(expected)


# ---- the stream of tokens ----


def test_token_stream_reads_across_chunks_files_and_parts(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 1000, 5000)
    features = datasets.Features({"tokens": datasets.List(datasets.Value("uint16"))})
    cuts = np.array_split(tokens, 100)
    files = []
    for part in range(2):
        rows = [row.tolist() for row in cuts[50 * part : 50 * part + 50]]
        rows.insert(9, [])
        dataset = datasets.Dataset.from_dict({"tokens": rows}, features=features)
        files.append(tmp_path / f"tokens_{part}.arrow")
        dataset.map(lambda batch: batch, batched=True, batch_size=7, writer_batch_size=7, cache_file_name=str(files[-1]))
    stream = TokenStream(files)
    assert stream.read(0, 5000).tolist() == tokens.tolist()
    part = stream.part(900, 4200).part(50, 3000)
    assert len(part) == 2950
    for start, stop in np.sort(np.random.default_rng(1).integers(0, 2950, (50, 2))):
        assert part.read(start, stop + 1)[: stop - start].tolist() == tokens[950 + start : 950 + stop].tolist()
    assert part.counts(1000).tolist() == np.bincount(tokens[950:3900], minlength=1000).tolist()


@pytest.mark.parametrize("vocab_size, dtype", [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_tokens_are_stored_as_narrow_as_the_vocabulary_allows(twenty, monkeypatch, vocab_size, dtype):
    class Wide(Tokenizer):
        """The byte tokenizer with its ids moved to the end of a larger vocabulary."""

        def __init__(self) -> None:
            super().__init__(byte_tokenizer()._backend)
            self.vocab_size, self.eos_id = vocab_size, vocab_size - 1

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [[vocab_size - 257 + token for token in ids] for ids in super().encode_batch(texts)]

    monkeypatch.setattr(corpus, "byte_tokenizer", Wide)
    val = open_corpus(twenty, seed=0).val
    assert val.read(0, 1).dtype == dtype
    assert val.read(0, len(val)).max() == vocab_size - 1


# ---- the cache ----


def forbid(monkeypatch, name: str) -> None:
    def fail(*_, **__):
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(corpus, name, fail)


def test_second_time_reads_the_cache(twenty, monkeypatch):
    first = open_corpus(twenty, seed=0)
    forbid(monkeypatch, "_write")
    second = open_corpus(twenty, seed=0)
    assert second.stats == first.stats
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    twenty.seq_len = twenty.batch_size = 8
    assert open_corpus(twenty, seed=0).stats == first.stats  # a matter of windows, not of tokens


def test_second_time_reads_the_cache_of_a_hub_data_set(tmp_path, monkeypatch):
    stats = open_corpus(hub_folder(tmp_path), seed=0).stats
    forbid(monkeypatch, "_write")
    assert open_corpus(config(tmp_path, None, hub_name=str(tmp_path / "owner" / "name")), seed=0).stats == stats


def test_same_content_elsewhere_is_the_same_corpus(tmp_path, twenty, monkeypatch):
    stats = open_corpus(twenty, seed=0).stats
    forbid(monkeypatch, "_write")
    twenty.files = write_txt(tmp_path / "copy", documents(20))
    assert open_corpus(twenty, seed=0).stats == stats


@pytest.mark.parametrize("change", ["content", "order", "tokenizer", "vocab_size", "val_fraction", "split_seed"])
def test_what_decides_the_tokens_names_the_cache_entry(tmp_path, twenty, change):
    twenty.tokenizer, twenty.vocab_size = "bpe", 260
    open_corpus(twenty, seed=0)
    path = Path(twenty.files[7])
    if change == "content":
        path.write_text(path.read_text().replace("w1", "w2"))  # as long as before
    elif change == "order":
        twenty.files = twenty.files[::-1]
    else:
        setattr(twenty, change, {"tokenizer": "bytes", "vocab_size": 261, "val_fraction": 0.3, "split_seed": 1}[change])
    open_corpus(twenty, seed=1)
    assert len([path for path in Path(twenty.cache_dir).iterdir() if path.is_dir()]) == 2


def test_only_the_entry_is_left(twenty):
    open_corpus(twenty, seed=0)
    [entry] = [path for path in Path(twenty.cache_dir).iterdir() if path.is_dir()]
    assert sorted(path.name for path in entry.iterdir()) == ["corpus.json", "tokenizer.json", "tokens.arrow"]


def test_several_processes_tokenise_the_same(tmp_path, monkeypatch):
    texts = [*documents(30, words=200), f"spelled {END} out"]
    files = write_txt(tmp_path / "text", texts)
    one, two = (config(tmp_path, files, tokenizer="bpe", vocab_size=300, num_proc=n) for n in (1, 2))
    two.cache_dir += "2"
    monkeypatch.setattr(corpus, "MB", 1000)  # so that 30 kB are worth two processes
    alone, together = open_corpus(one, seed=0), open_corpus(two, seed=0)
    assert len(list(Path(two.cache_dir).glob("*/tokens*.arrow"))) == 2
    for part in ("train", "val"):
        a, b = getattr(alone, part), getattr(together, part)
        assert a.read(0, len(a)).tolist() == b.read(0, len(b)).tolist()


def test_processes_at_once_build_once(tmp_path, twenty, monkeypatch):
    build = corpus._write

    def counted(*args) -> None:
        (tmp_path / f"built by {os.getpid()}").touch()
        build(*args)

    monkeypatch.setattr(corpus, "_write", counted)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=open_corpus, args=(twenty, 0)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(tmp_path.glob("built by *"))) == 1


def test_killed_half_way_is_built_again(twenty, monkeypatch):
    def killed(folder: Path, *_) -> None:
        (folder / "tokens.arrow").write_bytes(b"half")
        os.kill(os.getpid(), 9)

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_write", killed)
        process = multiprocessing.get_context("fork").Process(target=open_corpus, args=(twenty, 0))
        process.start()
        process.join(60)
        assert process.exitcode == -9
    assert list(Path(twenty.cache_dir).glob("*.partial"))
    assert open_corpus(twenty, seed=0).stats.n_documents == 20
    assert not list(Path(twenty.cache_dir).glob("*.partial"))


def test_damaged_cache(twenty):
    open_corpus(twenty, seed=0)
    [tokens] = Path(twenty.cache_dir).glob("*/tokens.arrow")
    tokens.write_bytes(tokens.read_bytes()[:200])
    with pytest.raises(UserError, match=r"is damaged .* delete that folder"):
        open_corpus(twenty, seed=0)


@pytest.mark.parametrize("name", ["tokens.arrow", "tokenizer.json", "corpus.json"])
def test_no_flipped_bit_of_the_cache_gets_through(twenty, name):
    before = open_corpus(twenty, seed=0)
    [path] = Path(twenty.cache_dir).glob(f"*/{name}")
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        try:
            opened = open_corpus(twenty, seed=0)
        except UserError as error:
            assert "is damaged (" in str(error) and "delete that folder" in str(error)
        else:  # white space between JSON's values
            assert name == "corpus.json" and opened.stats == before.stats and len(opened.train) == len(before.train)


def test_cache_that_cannot_be_written(tmp_path, twenty):
    (tmp_path / "file").touch()
    twenty.cache_dir = str(tmp_path / "file" / "cache")
    refused(twenty, r"cannot be written \(Not a directory\); set data\.cache_dir=PATH")


PREPARE = """
from flash_ladder.data import corpus
from flash_ladder.schema import DataConfig
corpus.MB = 10_000  # so that 30 kB are worth two processes, and no bar
corpus.open_corpus(DataConfig(source="files", files={files}, cache_dir={cache!r}, vocab_size=300), seed=0)
"""


def test_nothing_is_printed(tmp_path):
    program = PREPARE.format(files=write_txt(tmp_path / "text", documents(90)), cache=str(tmp_path / "cache"))
    environment = {key: value for key, value in os.environ.items() if "PROGRESS_BARS" not in key}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(list(tmp_path.glob("cache/*/tokens_*.arrow"))) == 2
