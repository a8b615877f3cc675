"""The file of torch.save with a digest of its own bytes, so that a checkpoint that is copied alone can be told from a changed one.

torch.save writes a zip archive. The digest is that archive's comment, which zip readers and torch.load pass over. It covers every
byte before it: torch reads parts of the archive's directory that no checksum of zip covers.
"""

from __future__ import annotations

import os
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import xxhash

NAME = b"flash-ladder xxh3_128 "
COMMENT = len(NAME) + xxhash.xxh3_128().digest_size * 2  # bytes of the comment
LENGTH = struct.pack("<H", COMMENT)  # what zip has before it
BLOCK = 1 << 22


class _Hashed:
    """A file that is hashed as it is written, which costs a tenth of what zip's checksums cost."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, xxhash.xxh3_128()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save(value: Any, path: Path) -> None:
    """torch.save, with the digest."""
    with path.open("wb") as file:
        hashed = _Hashed(file)
        torch.save(value, cast("BinaryIO", hashed))
        file.seek(-len(LENGTH), os.SEEK_END)  # the archive ends with the length of its comment, 0 as torch writes it
        file.write(LENGTH + NAME + hashed.hash.hexdigest().encode())


def fault(path: Path) -> str | None:
    """What is wrong with a file of `save`, or of torch.save alone; None where nothing is.

    Raises whatever zipfile makes of a file that is no archive.
    """
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            # What torch.save never writes. Python does not mind an attribute by which torch takes a tensor for a folder, and
            # leaves its memory as it was.
            if entry.compress_type or entry.external_attr or entry.internal_attr or entry.flag_bits & 1:
                return f"its directory has an entry that torch does not write, {entry.filename!r}"
            if entry.filename.endswith("/byteorder") and file.read(entry) != sys.byteorder.encode():
                return f"its numbers are not {sys.byteorder}-endian"
        if not file.comment:
            changed = file.testzip()
            return changed and f"it was changed since it was written (the checksum of {changed} differs)"
    return None if file.comment == NAME + _digest(path) else "it was changed or cut short since it was written (its digest differs)"


def _digest(path: Path) -> bytes:
    """The digest, in hex, of a file of `save`, whatever its comment says."""
    found, left = xxhash.xxh3_128(), path.stat().st_size - len(LENGTH) - COMMENT
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(BLOCK, left))):
            found.update(block)
            left -= len(block)
    found.update(bytes(len(LENGTH)))
    return found.hexdigest().encode()
