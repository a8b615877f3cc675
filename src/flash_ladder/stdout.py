"""What is printed where nobody reads it any more: `| head` stops in the middle."""

from __future__ import annotations

import os
import select
import signal
import sys

NOT_READ = 128 + signal.SIGPIPE  # how a command ends whose output nobody reads, as the shell counts


def is_read() -> bool:
    """False where standard output is a pipe whose reader has gone."""
    poll = select.poll()
    poll.register(1, 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def drop() -> None:
    """Sends what is printed from here on nowhere, with what waits in the buffer."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout.flush()


def flushed() -> bool:
    """Writes what waits in the buffer; False where nobody reads it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop()
        return False
    return True
