"""What a signal to stop does to a command: one line, exit code 128 + n, no traceback, and no process left behind.

- While modules are imported, and once the work is done, it ends the process at once (`ends_at_once`).
- While a command works, it raises Ended, so that files are closed and half-made ones removed (`raises_ended`). A second one ends
  the process at once.
- In training the step in hand and a checkpoint come first (training.callbacks.StopOnSignal).

Hardly anything is imported here: train.py asks for this before anything else.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
ENDS_ITSELF = "wandb-core"  # a child that ends with its parent, once it has written what it has


class Ended(SystemExit):
    """A signal ended the command. Not an Exception, which a library might take for its own."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"


def ends_at_once() -> None:
    """Lets every signal to stop end this process at once, from here on."""
    handle(end_at_once)


@contextlib.contextmanager
def raises_ended() -> Iterator[None]:
    """A context in which a signal to stop raises Ended in the main thread, whatever a library makes of that on its way."""
    received: list[int] = []

    def receive(signum: int) -> None:
        if received:
            end_at_once(signum)
        received.append(signum)
        say(str(Ended(signum)))
        raise Ended(signum)

    before = handle(receive)
    try:
        yield
        if received:
            raise Ended(received[0])
    except BaseException as error:
        if received and not isinstance(error, Ended):
            raise Ended(received[0]) from None
        raise
    finally:
        restore(before)


def handle(receive: Callable[[int], None]) -> dict[int, Any]:
    """Lets `receive` handle every signal to stop, and returns the handlers before.

    A signal that was ignored stays so (SIGHUP under nohup), but for SIGINT, which a shell's `&` ignores: whoever sends it to a
    process by its number means it.
    """
    own = os.getpid()

    def handler(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != own:  # a copy of this process, such as one that loads data: it just ends
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        else:
            receive(signum)

    heard = [s for s in SIGNALS if s == signal.SIGINT or signal.getsignal(s) != signal.SIG_IGN]
    return {signum: signal.signal(signum, handler) for signum in heard}


def restore(before: dict[int, Any]) -> None:
    """Gives the signals back the handlers that they had."""
    for signum, handler in before.items():
        signal.signal(signum, handler)


def end_at_once(signum: int) -> NoReturn:
    """Ends this process and those that it started."""
    say(f"stopped at once by {signal.Signals(signum).name}")
    from flash_ladder.processes import children  # after the line: a signal may come before its own imports are done

    for pid in children(but=ENDS_ITSELF):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(128 + signum)


def say(line: str) -> None:
    """One line on the screen, of the first process of a run alone. Unlike print, it may be called in a signal's handler."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"\n{line}\n".encode())
