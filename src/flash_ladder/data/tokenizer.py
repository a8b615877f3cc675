"""Text to token ids and back: a byte-level BPE, so that every string has an encoding and decodes to itself exactly.

The `tokenizers` library trains and encodes; this file fixes the choices. The alphabet is the 256 bytes, and one special
token, <|endoftext|>, closes every document.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from flash_ladder.errors import UserError

END_OF_TEXT = "<|endoftext|>"
FILE = "tokenizer.json"
PROBE = "def F(x):\n\treturn  x'll 12\r\n naïve é 東京ﬁ\x00"  # what a tokenizer that is no byte-level one gives back changed

# So many characters of one kind in a row, which no word of a language has: a chain of base pairs, a picture in base64.
LONG_WORD = re.compile(r"[^\W\d_]{1000}|\d{1000}|[^\w\s]{1000}|_{1000}|\s{1000}")

# data.num_proc processes tokenise the text. Each does without threads, which would not survive the fork that makes it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokenizer:
    """A byte-level BPE. Token ids run from 0 to vocab_size - 1; `eos_id` is <|endoftext|>.

    Text that spells <|endoftext|> out is text like any other: only `eos_id` itself ends a document.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._backend.encode_special_tokens = True  # spelled-out special tokens are encoded as text
        self.vocab_size: int = backend.get_vocab_size()
        self.eos_id = cast("int", backend.token_to_id(END_OF_TEXT))  # not None: `load` refuses a tokenizer without it

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, with nothing put before or after."""
        return self._backend.encode(text).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts at once, faster than one by one."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids past the vocabulary are left out."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def starting_with(self, prefix: str) -> list[int]:
        """Returns the ids of all tokens whose text begins with `prefix`."""
        return [i for i in range(self.vocab_size) if self.decode([i]).startswith(prefix)]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that depend on the whole vocabulary and its merges."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return self._backend.to_str()

    def save(self, folder: Path) -> None:
        """Writes folder/tokenizer.json: all of it or nothing, even if the process dies."""
        partial = Path(folder) / f".{FILE}.{os.getpid()}"
        partial.write_text(self.to_json(), encoding="utf-8")
        os.replace(partial, Path(folder) / FILE)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads folder/tokenizer.json, as `read` does."""
        return cls.read(Path(folder) / FILE)

    @classmethod
    def read(cls, path: Path) -> Tokenizer:
        """Reads a tokenizer.json. Raises UserError where it is missing, is no byte-level tokenizer, or has no <|endoftext|>."""
        if not path.is_file():
            raise UserError(f"{path} is missing: it is written beside every run and every exported model; name such a folder")
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
            ids = sorted(backend.get_vocab().values())
            exact = backend.decode(backend.encode(PROBE, add_special_tokens=False).ids, skip_special_tokens=False) == PROBE
        except Exception as error:  # the library raises nothing more precise
            raise UserError(f"{path} is not a tokenizer ({str(error).splitlines()[0]}); copy it again from its run") from None
        if backend.token_to_id(END_OF_TEXT) is None:
            raise UserError(f"{path} has no {END_OF_TEXT} token, so it was not written by Flash Ladder; copy it again from its run")
        if ids != list(range(len(ids))) or not exact:
            raise UserError(f"{path} is no byte-level tokenizer, which gives every text back exactly; copy it again from its run")
        return cls(backend)

    def __reduce__(self) -> tuple:
        """Pickled as its JSON, so that worker processes get the same tokenizer, settings included."""
        return _from_json, (self.to_json(),)


def train_bpe(texts: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
    """Trains a BPE with GPT-2's split into words on `texts`; the same texts give the same tokenizer.

    `vocab_size` is an upper bound, 256 bytes and <|endoftext|> included: a small text has fewer pairs worth a token.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    backend.train_from_iterator(map(_cut_long_words, texts), trainer)
    return Tokenizer(backend)


def _cut_long_words(text: str) -> list[str]:
    """`text` in pieces without words that the trainer, whose time grows with the length of the different words, spends hours on."""
    cuts = [0, *(word.end() for word in LONG_WORD.finditer(text)), len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(cuts)]


def byte_tokenizer() -> Tokenizer:
    """Returns the tokenizer without merges: every byte of the UTF-8 text is a token, and <|endoftext|> the 257th."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


def _from_json(text: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text))
