"""What a run says: on the screen, and with the time in its folder's train.log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler, WatchedFileHandler
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

SAID = logging.getLogger("flash_ladder")
LIGHTNING = logging.getLogger("lightning.pytorch")  # its warnings are kept as well
LINE = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")


@rank_zero_only
def say(*words: object) -> None:
    """Prints on the first process."""
    text = " ".join(map(str, words))
    print(text, flush=True)
    if text and SAID.handlers:
        SAID.info(text)


def warn(text: str) -> None:
    """One line on the screen, without the source line that Python's warnings add, and above a progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)
    sys.stderr.flush()
    if SAID.handlers:  # without a run's file, logging would print it once more
        SAID.warning(text)


class LogFile(WatchedFileHandler):
    """train.log, begun anew where it was removed. A line that the disk does not take is on the screen alone."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Logging would print a traceback."""

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def run_log() -> Iterator[Callable[[Path], None]]:
    """Keeps what is said from here on; yields the function that writes it to a file, from the first line on.

    A run that is refused before its folder is begun leaves no file.
    """
    before = SAID.level, SAID.propagate
    SAID.setLevel(logging.INFO)
    SAID.propagate = False  # it is on the screen already
    early = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
    SAID.addHandler(early)
    files: list[logging.Handler] = []

    def open_file(path: Path) -> None:
        file = LogFile(path, encoding="utf-8")
        file.setFormatter(LINE)
        files.append(file)
        early.setTarget(file)
        early.flush()
        SAID.removeHandler(early)
        SAID.addHandler(file)
        LIGHTNING.addHandler(file)

    try:
        yield open_file
    finally:
        for handler in (early, *files):
            SAID.removeHandler(handler)
            LIGHTNING.removeHandler(handler)
            handler.close()
        SAID.setLevel(before[0])
        SAID.propagate = before[1]
