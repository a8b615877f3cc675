"""flash_ladder.training.ranks: who is lost, by what the processes say to each other in a store."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from flash_ladder.errors import UserError
from flash_ladder.processes import Processes
from flash_ladder.training import ranks
from flash_ladder.training.ranks import Lost, RankLost, Ranks, Watch, how_it_ended, is_alive
from flash_ladder.training.result import OutOfMemory

HERE = {"pid": os.getpid(), "host": socket.gethostname()}


@pytest.fixture
def gone():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def watch(store, rank, *peers, timeout=60.0):
    """The watch of a process that has met `peers`, not running."""
    made = Watch(Processes("torchrun", rank, rank, len(peers), 1, "a", 1), [], timeout)
    made.store, made.peers, made.beats = store, list(peers), [(b"", time.monotonic())] * len(peers)
    for other in range(len(peers)):
        store.set(f"beat/{other}", "0")
    store.set("verdict", "")
    return made


def test_all_is_well_where_all_live():
    store = dist.HashStore()
    assert watch(store, 0, HERE, HERE)._look() is None


def test_a_process_that_is_gone_is_lost(gone):
    first = watch(dist.HashStore(), 0, HERE, {"pid": gone, "host": HERE["host"]})
    lost = first._look()
    assert lost == Lost(1, "has died")
    assert str(first.error(lost)) == f"rank 1 (process {gone} on {HERE['host']}) has died"


def test_a_process_that_has_left_is_not_lost(gone):
    store = dist.HashStore()
    first = watch(store, 0, HERE, {"pid": gone, "host": HERE["host"]})
    store.set("left/1", "1")
    assert first._look() is None


def test_a_process_elsewhere_is_lost_once_it_has_been_silent_for_the_time_out():
    store = dist.HashStore()
    first = watch(store, 0, HERE, {"pid": 1, "host": "elsewhere"}, timeout=0.2)
    assert first._look() is None
    time.sleep(0.15)
    store.set("beat/1", "1")
    assert first._look() is None  # it answered
    time.sleep(0.15)
    assert first._look() is None
    time.sleep(0.15)
    assert "has not answered for 0 s" in first._look().how


def test_a_failure_is_told_to_all_and_the_first_one_stands():
    store = dist.HashStore()
    first, second = watch(store, 0, HERE, HERE), watch(store, 1, HERE, HERE)
    assert second.reason(OutOfMemory("no memory")) is None
    assert second.reason(ValueError("later")) is None
    lost = first._look()
    assert lost == Lost(1, "failed: no memory", of_memory=True)
    assert isinstance(first.error(lost), OutOfMemory)


def test_a_broken_collective_is_put_down_to_the_lost_process(gone):
    first = watch(dist.HashStore(), 0, HERE, {"pid": gone, "host": HERE["host"]})
    first._decide(first._look())
    lost = first.reason(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2"))
    assert lost.rank == 1 and isinstance(first.error(lost), RankLost) and first.speaks(lost)
    assert first.reason(ValueError("of its own")) is None


def test_a_process_that_lets_the_others_wait_is_named(monkeypatch):
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.05)
    store = dist.HashStore()
    first = watch(store, 0, HERE, HERE, HERE)
    store.set("waited/2", "1")
    lost = first.reason(RuntimeError("Timed out waiting 30000ms for recv operation to complete"))
    assert lost.rank == 1 and "has let the others wait in a collective for 90 s" in lost.how


def test_words():
    assert how_it_ended(-9) == "has died (SIGKILL)" and how_it_ended(2).startswith("has ended with exit code 2")
    assert is_alive(os.getpid()) and not is_alive(2**22 + 1)
    assert RankLost("x").exit_code == 1 and UserError("x").exit_code == 2


def waiting(store, timeout):
    """The first of two processes, which the other one has not joined yet."""
    made = object.__new__(Ranks)
    made.timeout, made.watch = timeout, watch(store, 0, HERE, HERE)
    return made


def test_a_wait_for_the_others_ends_where_one_is_lost_or_late():
    first, processes = waiting(store := dist.HashStore(), 60.0), Processes("torchrun", 0, 0, 2, 1, "a", 1)
    first.watch._decide(Lost(1, "has died"))
    with pytest.raises(RuntimeError, match="connection") as broken:
        first._wait_for_all(store, processes)
    assert first.watch.reason(broken.value) == Lost(1, "has died")
    with pytest.raises(RankLost, match="rank 1 has not started within 0 s"):
        waiting(store := dist.HashStore(), 0.1)._wait_for_all(store, processes)
    store.set("1", "1")
    waiting(store, 60.0)._wait_for_all(store, processes)


def test_a_process_that_a_signal_stopped_is_named_with_it():
    assert how_it_ended(143) == "was stopped by SIGTERM"
