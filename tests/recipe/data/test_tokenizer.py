"""The tokenizer: exact round trips, one special token, saving and loading."""

import pickle
import random
import time

import pytest

from flash_ladder.data import tokenizer as tokenizers
from flash_ladder.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from flash_ladder.errors import UserError

TEXT = "def f(x):\n\treturn x  # naïve café, 東京, 👩‍🚀\r\n\n  end\u2028 \x00\x7f" * 3


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([TEXT, "return return return"], vocab_size=280)


@pytest.fixture(params=["bpe", "bytes"])
def tokenizer(request, bpe) -> Tokenizer:
    return bpe if request.param == "bpe" else byte_tokenizer()


@pytest.mark.parametrize("text", [TEXT, "", " ", "\n", "\r\n", "ÿ\U0010ffff", "a<|endoftext|>b"])
def test_every_string_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, text]) == [tokenizer.encode(text)] * 2


def test_bytes_are_tokens_and_bpe_is_shorter(bpe):
    n_bytes = len(TEXT.encode())
    assert len(byte_tokenizer().encode(TEXT)) == n_bytes
    assert len(bpe.encode(TEXT)) < n_bytes


def test_vocabulary_sizes(bpe):
    assert byte_tokenizer().vocab_size == 257
    assert bpe.vocab_size == 280
    assert train_bpe(["ab"], vocab_size=5000).vocab_size == 257  # nothing occurs twice: only the bytes
    assert 0 <= bpe.eos_id < 280
    assert bpe.decode([bpe.eos_id]) == "<|endoftext|>"


def test_ids_stay_under_vocab_size(tokenizer):
    assert max(tokenizer.encode(TEXT)) < tokenizer.vocab_size


def test_spelled_out_end_of_text_is_text(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer)), Tokenizer.load(tmp_path)):
        assert copy.eos_id not in copy.encode("a<|endoftext|>b")
        assert copy.eos_id not in copy.encode_batch(["a<|endoftext|>b"])[0]


def test_padding_of_the_vocabulary_decodes_to_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.vocab_size + 5]) == "ab"


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]  # nothing partial is left
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert loaded.fingerprint == tokenizer.fingerprint


def test_fingerprint_names_the_vocabulary(bpe):
    assert train_bpe([TEXT, "return return return"], vocab_size=280).fingerprint == bpe.fingerprint
    assert len({bpe.fingerprint, byte_tokenizer().fingerprint, train_bpe([TEXT], vocab_size=270).fingerprint}) == 3


@pytest.mark.parametrize("content", [None, "", "{}", '{"version": "1.0"', "not json"])
def test_missing_or_corrupt_file(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_foreign_tokenizer(tmp_path):
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no .* token, so it was not written by Flash Ladder"):
        Tokenizer.load(tmp_path)


def test_words_without_end_are_cut_for_the_trainer():
    """Its time grows with the length of the different words: several seconds for this one as a whole."""
    row = "".join(random.Random(0).choices("ACGT", k=1 << 18))
    start = time.process_time()
    trained = train_bpe([row], 512)
    assert time.process_time() - start < 2
    assert len(trained.encode(row[:3000])) < 1000 and trained.decode(trained.encode(row[:3000])) == row[:3000]
    words = " ".join(f"word{i % 97}" for i in range(2000))
    assert tokenizers._cut_long_words(words) == [words]
    assert "".join(tokenizers._cut_long_words(row)) == row
