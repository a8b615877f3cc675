"""Mixing files by weight, a validation file of one's own, and tokens that are there already."""

from collections import Counter

import numpy as np
import pytest

from flash_ladder.data.corpus import open_corpus
from flash_ladder.data.sources import ROW_CHARS
from flash_ladder.data.tokenizer import byte_tokenizer
from tests.helpers.corpora import END, config, documents, refused, text_data, text_of, write_txt


def test_documents_are_drawn_by_weight(tmp_path):
    for name, n in (("a", 60), ("b", 60)):
        write_txt(tmp_path / name, [f"{name}{i} " for i in range(n)])
    long = write_txt(tmp_path / "c", ["c" * (5 * ROW_CHARS)])
    cfg = config(tmp_path, [f"{tmp_path}/a/*.txt", f"{tmp_path}/b/*.txt"], weights=[3, 1])
    opened = open_corpus(cfg, seed=0)
    found = [text for part in (opened.train, opened.val) for text in text_of(part, opened.tokenizer).split(END)[:-1]]
    counts = Counter(text[0] for text in found)
    assert 55 <= counts["a"] <= 60 and 10 <= counts["b"] <= 30 and len({*found}) == len(found)  # none twice
    assert open_corpus(config(tmp_path, cfg.files), seed=0).stats.n_documents == 120
    whole = open_corpus(config(tmp_path, [f"{tmp_path}/a/*.txt", long[0]], weights=[1, 1], val_fraction=0.001), seed=0)
    both = text_of(whole.train, whole.tokenizer).removesuffix(END) + text_of(whole.val, whole.tokenizer)
    assert "c" * (5 * ROW_CHARS) in both  # its rows follow one another
    refused(config(tmp_path, [f"{tmp_path}/a/*.txt", f"{tmp_path}/a/0001.txt"], weights=[1, 1]), "belongs to two entries")


def test_a_validation_file_of_ones_own(tmp_path):
    train, val = write_txt(tmp_path / "train", documents(9)), write_txt(tmp_path / "val", ["held out\r\n" * 9, "and this"])
    opened = open_corpus(config(tmp_path, train, val_files=val), seed=0)
    assert text_of(opened.val, opened.tokenizer) == "held out\r\n" * 9 + END + "and this" + END
    assert text_of(opened.train, opened.tokenizer) == "".join(text + END for text in documents(9))
    assert opened.stats.split == "data.val_files" and opened.stats.n_documents == 11
    refused(config(tmp_path, train, val_files=str(tmp_path / "none.txt")), r"data\.val_files=.*none\.txt: no such file")


def arrays(tmp_path, *parts) -> list[str]:
    paths = [tmp_path / f"{i}.bin" for i in range(len(parts))]
    for path, tokens in zip(paths, parts, strict=True):
        path.write_bytes(np.asarray(tokens, dtype=np.uint16).tobytes())
    return list(map(str, paths))


def tokens_of(part) -> list[int]:
    return part.read(0, len(part)).tolist()


@pytest.fixture
def own(tmp_path):
    """The path of a tokenizer of one's own."""
    byte_tokenizer().save(tmp_path)
    return str(tmp_path / "tokenizer.json")


def test_tokens_are_taken_as_they_are(tmp_path, own):
    tokens = np.random.default_rng(0).integers(0, 257, 200_000)
    files = arrays(tmp_path, tokens[:150_000], tokens[150_000:])
    opened = open_corpus(config(tmp_path, files, tokenizer=own, val_fraction=0.01), seed=0)
    assert tokens_of(opened.train) + tokens_of(opened.val) == tokens.tolist() and len(opened.val) == 2000
    assert opened.stats.n_documents == (tokens == 256).sum() and "by position" in opened.stats.split
    opened = open_corpus(config(tmp_path, files[0], val_files=files[1], tokenizer=own), seed=0)
    assert tokens_of(opened.val) == tokens[150_000:].tolist() and tokens_of(opened.train) == tokens[:150_000].tolist()
    np.save(tmp_path / "t.npy", tokens)
    assert text_data(config(tmp_path, str(tmp_path / "t.npy"), tokenizer=own)).stats.n_train_tokens == 160_000


def test_a_tokenizer_of_ones_own_for_text(tmp_path, own):
    files = write_txt(tmp_path / "text", documents(20))
    with_own, with_bytes = (open_corpus(config(tmp_path, files, tokenizer=name), seed=0) for name in (own, "bytes"))
    assert tokens_of(with_own.train) == tokens_of(with_bytes.train)
    refused(config(tmp_path, files, tokenizer=str(tmp_path / "none.json")), "none.json is missing")


def test_other_arrays_are_refused_by_name(tmp_path, own):
    good, wide, llm_c, megatron = arrays(tmp_path, [1] * 90, [300] * 90, [20240520 & 0xFFFF, 20240520 >> 16, 1], [1] * 90)
    (tmp_path / "3.idx").touch()
    np.save(tmp_path / "two.npy", np.zeros((9, 9), dtype=np.uint16))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    [text] = write_txt(tmp_path / "text", ["some text"])
    for files, tokenizer, message in (
        (good, "bpe", r"the tokenizer that wrote them is none of ours; data\.tokenizer=PATH"),
        ([good, text], own, "holds tokens, and other files text"),
        (wide, own, r"holds the token 300, and data\.tokenizer has 257"),
        (llm_c, own, "is llm.c's, with a header"),
        (megatron, own, "is Megatron's"),
        (str(tmp_path / "two.npy"), own, r"holds uint16 of shape \(9, 9\)"),
        (str(tmp_path / "objects.npy"), own, "is no array of tokens"),
        (str(tmp_path / "odd.bin"), own, "is no array of tokens"),
    ):
        refused(config(tmp_path, files, tokenizer=tokenizer), message)
