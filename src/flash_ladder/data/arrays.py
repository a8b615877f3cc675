"""Text that is tokenised already: nanoGPT's train.bin (uint16, nothing else) and one-dimensional .npy files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flash_ladder.errors import UserError

ENDINGS = (".bin", ".npy")
LLM_C = 20240520  # the first number of llm.c's files, which have a header


def open_array(path: Path) -> np.ndarray:
    """The token ids of a file, memory-mapped, [tokens]. Raises UserError for a file that holds something else."""
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.with_suffix(".idx").exists():
            raise UserError(
                f"{path} is Megatron's (there is an .idx beside it), which is not read; data.files takes the text itself"
            )
        else:
            array = np.memmap(path, dtype="<u2", mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} is no array of tokens ({str(error).splitlines()[0]}); .bin holds uint16 and nothing else"
        ) from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{path} holds {array.dtype} of shape {array.shape}; token ids are whole numbers in one dimension")
    if path.suffix.lower() == ".bin" and len(array) > 1 and int(array[0]) + (int(array[1]) << 16) == LLM_C:
        raise UserError(f"{path} is llm.c's, with a header, which is not read; data.files takes the text itself")
    return array


def read_span(path: Path, start: int, stop: int, vocab_size: int) -> np.ndarray:
    """Tokens start to stop of a file. Raises UserError for an id that the tokenizer does not have."""
    tokens = np.asarray(open_array(path)[start:stop])
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"{path} holds the token {low if low < 0 else high}, and data.tokenizer has {vocab_size}; name the tokenizer that "
            "wrote it"
        )
    return tokens
