"""What a command prints must not end it: a terminal may be closed, the reader of a pipe may die, the disk of a log may be full."""

from __future__ import annotations

import io
import sys
from typing import TextIO


class Forgiving(io.FileIO):
    """A file whose writes never fail: what it does not take is dropped. `error` is what the first such write met."""

    error: OSError | None = None

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data) or len(data)
        except OSError as error:
            self.error = self.error or error
            return len(data)


def forgiving(stream: TextIO, raw: Forgiving) -> TextIO:
    """`raw` as text, with the encoding and buffering of `stream`."""
    assert isinstance(stream, io.TextIOWrapper)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[type-var]  # typeshed wants its own file types
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def outlive_readers() -> list[Forgiving]:
    """Makes this process's own stdout and stderr forgiving, and returns their files; what something has replaced is left alone."""
    files = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            files.append(Forgiving(stream.fileno(), "w", closefd=False))
            setattr(sys, name, forgiving(stream, files[-1]))
    return files
