"""A command of this recipe as a process of its own that need not import anything.

Python and PyTorch take four to eight seconds of a core to start, which is most of what a small training costs. Here a server of
Python's multiprocessing imports once what the commands need, and every command is a fork of it. What an import itself does, when it
happens and in what environment, only a new interpreter shows: such tests start one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.helpers.preloaded"])


class Command:
    """`python SCRIPT ARGUMENTS...` in the folder `cwd`, in a session of its own; what it prints is kept in files."""

    def __init__(self, script: str, arguments: list[str], cwd: Path) -> None:
        self.arguments = [str(ROOT / script), *map(str, arguments)]
        self.files = tempfile.TemporaryDirectory()
        self.streams = [Path(self.files.name, name) for name in ("stdout", "stderr")]
        self.process = _SERVER.Process(target=_work, args=(self.arguments, str(cwd), dict(os.environ), self.streams))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, minus the signal's number where one ended it; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """`returncode`, as subprocess.Popen has it."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends it a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 120) -> int:
        """Its exit code, once it has ended; one that takes longer than `timeout` seconds is killed."""
        self.process.join(timeout)
        if self.returncode is None:
            self.process.kill()
            self.process.join()
            raise subprocess.TimeoutExpired(self.arguments, timeout, "\n".join(self.printed()))
        return self.returncode

    def printed(self) -> tuple[str, str]:
        """What it has printed so far on stdout and stderr."""
        out, errors = (path.read_text(errors="replace") if path.exists() else "" for path in self.streams)
        return out, errors


def run(script: str, *arguments: str, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess:
    """A command from its start to its end."""
    command = Command(script, list(arguments), cwd)
    return subprocess.CompletedProcess(command.arguments, command.wait(timeout), *command.printed())


def _work(arguments: list[str], cwd: str, environment: dict[str, str], streams: list[Path]) -> None:
    """The forked process."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ |= environment
    write_to(*streams)
    sys.argv[:] = arguments
    os._exit(exit_code(lambda: runpy.run_path(arguments[0], run_name="__main__")))


def write_to(out: Path, errors: Path) -> None:
    """Gives this process an empty stdin, and files for what it says, which may be one and the same."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), os.open(out, flags), os.open(errors, flags))):
        os.dup2(file, number)


def exit_code(work: Callable[[], object]) -> int:
    """What Python would make of the end of `work`."""
    try:
        work()
        return 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
