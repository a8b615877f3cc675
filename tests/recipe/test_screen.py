"""What is printed into a pipe that nobody reads, or onto a full disk, is dropped, and nothing else happens."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash_ladder.screen import Forgiving, forgiving

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("buffering", [1, -1])
def test_a_reader_that_is_gone(buffering):
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", buffering) as stream:
        kept = forgiving(stream, Forgiving(writer, "w", closefd=False))
        print("é read", file=kept, flush=True)
        assert os.read(reader, 100).decode() == "é read\n"
        os.close(reader)
        for _ in range(3):
            print("not read", file=kept, flush=True)
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"x")


def test_a_reader_that_is_slow_may_not_end_a_command():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with os.fdopen(writer, "w") as stream:
        kept = forgiving(stream, Forgiving(writer, "w", closefd=False))
        for _ in range(100):
            print("x" * 10_000, file=kept, flush=True)
    os.close(reader)


def test_a_command_that_prints_onto_a_full_disk_says_so():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / "train.py", "--cfg", "job"], stdout=full, stderr=subprocess.PIPE, text=True)
    said = "error: what this command prints could not be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_a_command_whose_output_nobody_reads_is_silent():
    command = f"{sys.executable} {ROOT / 'train.py'} --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
