"""flash_ladder.stopping: what a signal does to a command, and that nothing it started is left."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from flash_ladder import processes, stopping
from flash_ladder.stopping import SIGNALS, Ended, raises_ended


@pytest.fixture(autouse=True)
def handlers():
    """Every signal at its default, but for pytest's SIGINT, and as it was afterwards."""
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in SIGNALS}
    yield
    stopping.restore(before)


def python(code: str, **environment: str) -> subprocess.Popen:
    """A process that runs `code` after the usual imports."""
    usual = "import os, signal, subprocess, sys, time; from flash_ladder import processes, stopping\n"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", usual + code], env=os.environ | environment, **pipes)


def is_gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process ends in time; one that nobody has waited for counts."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_raises_ended_with_its_code(capfd, signum):
    with pytest.raises(Ended) as ended, raises_ended():
        os.kill(os.getpid(), signum)
        pytest.fail("it was not raised")
    assert ended.value.code == 128 + signum
    assert capfd.readouterr().err == f"\nstopped by {signum.name}\n"
    assert signal.getsignal(signum) == signal.SIG_DFL


def test_what_a_library_makes_of_a_signal_is_still_that_signal():
    def turned():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            raise ImportError("the module failed to import") from None

    def swallowed():
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)

    for library in (turned, swallowed):
        with pytest.raises(Ended, match="stopped by SIGTERM"), raises_ended():
            library()
    with pytest.raises(ImportError), raises_ended():
        raise ImportError("without a signal it stays what it is")


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with raises_ended():
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_copy_of_the_process_just_ends(capfd):
    with raises_ended():
        copy = get_context("fork").Process(target=time.sleep, args=(30,))
        copy.start()
        time.sleep(0.1)
        os.kill(copy.pid, signal.SIGTERM)
        copy.join(5)
    assert copy.exitcode == -signal.SIGTERM and capfd.readouterr().err == ""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_at_once_leaves_no_process_and_one_line(rank):
    code = "stopping.ends_at_once(); print(subprocess.Popen(['sleep', '60']).pid, flush=True); os.kill(os.getpid(), signal.SIGINT)"
    process = python(code, RANK=rank)
    printed, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors == ("\nstopped at once by SIGINT\n" if rank == "0" else "")
    assert is_gone(int(printed))


def test_a_second_signal_ends_what_the_first_did_not():
    code = """
with stopping.raises_ended():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGINT)  # while files are closed
        time.sleep(60)
"""
    process = python(code)
    assert process.communicate(timeout=30)[1] == "\nstopped by SIGTERM\n\nstopped at once by SIGINT\n"
    assert process.returncode == 130


@pytest.mark.parametrize("wanted", [True, False])
def test_a_process_that_another_started_ends_with_it(wanted):
    child = f"""
from flash_ladder.processes import end_with_parent
end_with_parent(True)
end_with_parent({wanted})
print(0, flush=True)
import time
time.sleep(60)
"""
    code = f"""
environment = os.environ | {{processes.PARENT: str(os.getpid())}}
print(subprocess.Popen([sys.executable, "-c", {child!r}], env=environment).pid, flush=True)
time.sleep(60)
"""
    process = python(code)
    said = {int(process.stdout.readline()) for _ in range(2)}
    (pid,) = said - {0}
    process.kill()
    process.wait()
    assert is_gone(pid, 5.0 if wanted else 0.5) == wanted
    if not wanted:
        os.kill(pid, signal.SIGKILL)


def test_children_by_name():
    process = subprocess.Popen(["sleep", "60"])
    time.sleep(0.1)
    assert process.pid in processes.children() and process.pid in processes.children("sleep")
    assert process.pid not in processes.children("wandb-core") and process.pid not in processes.children(but="sleep")
    process.kill()
    time.sleep(0.1)
    assert process.pid not in processes.children()  # ended, though not waited for
    process.wait()
