"""Small corpora and configurations for the tests of everything that touches data."""

import json
import random
from pathlib import Path

import datasets
import pytest

from flash_ladder.data.batches import TextData
from flash_ladder.data.corpus import TokenStream
from flash_ladder.data.tokenizer import Tokenizer
from flash_ladder.errors import UserError
from flash_ladder.schema import DataConfig

END = "<|endoftext|>"


def documents(n: int, seed: int = 0, words: int = 60) -> list[str]:
    """Texts of `words` words each; every word names its document."""
    rng = random.Random(seed)
    return [" ".join(f"d{i}w{rng.randrange(10)}" for _ in range(words)) + "\n" for i in range(n)]


def words_of(text: str) -> set[str]:
    """The documents whose words a text holds."""
    return {word.split("w")[0] for word in text.replace(END, " ").split()}


def write_txt(folder: Path, texts: list[str]) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:04}.txt" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    return [str(path) for path in paths]


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(tmp_path: Path, files: str | list[str] | None, **parts) -> DataConfig:
    """A configuration with bytes as tokens, windows of 16 and batches of 4, unless `parts` say otherwise."""
    source = "files" if files else "hub"
    small = {"tokenizer": "bytes", "seq_len": 16, "batch_size": 4, "num_proc": 1, "val_fraction": 0.2}
    return DataConfig(**{"source": source, "files": files, "cache_dir": str(tmp_path / "cache"), **small, **parts})


def twenty_documents(tmp_path: Path) -> DataConfig:
    return config(tmp_path, write_txt(tmp_path / "text", documents(20)))


def hub_folder(tmp_path: Path) -> DataConfig:
    """Thirty documents and a null. The folder stands in for a hub data set: `datasets` loads both by name."""
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict({"text": [*documents(30), None], "id": list(range(31))}).to_parquet(str(folder / "train.parquet"))
    return config(tmp_path, None, hub_name=str(folder))


def text_data(cfg: DataConfig, seed: int = 0, accumulate: int = 1, val_batches: int = 3, **further: int) -> TextData:
    data = TextData(cfg, seed=seed, accumulate=accumulate, val_batches=val_batches, **further)
    data.prepare()
    return data


def text_of(stream: TokenStream, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(stream.read(0, len(stream)))


def refused(cfg: DataConfig, message: str, seed: int = 0) -> None:
    with pytest.raises(UserError, match=message) as caught:
        text_data(cfg, seed)
    assert "\n" not in str(caught.value)
    assert not list(Path(cfg.cache_dir).glob("*.partial"))
