"""What happens around the training loop: the bar, the warning of a long wait, and the stop on a signal."""

import os
import signal
from types import SimpleNamespace

import pytest

from flash_ladder.stopping import SIGNALS
from flash_ladder.training import callbacks
from flash_ladder.training.callbacks import Bar, SaysHowLong, StopOnSignal, Stopped
from flash_ladder.training.speed import Interval
from flash_ladder.units import duration


def at(step: int, max_steps: int = 800) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=max_steps, callback_metrics={}, world_size=1)


def after(callback, *steps: int, **more: int) -> None:
    for step in steps:
        callback.on_train_batch_end(at(step, **more), None, None, None, 0)


@pytest.mark.parametrize(("seconds", "shown"), [(1.5, list(range(1, 11))), (0.4, [1, 4, 7, 10])])
def test_the_bar_shows_slow_steps_one_by_one(monkeypatch, seconds, shown):
    """Steps that are not logged (here all but 10) are shown one a second."""
    seen, clock = [], SimpleNamespace(now=100.0)
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock.now)
    bar = Bar(SimpleNamespace(log_every=10, latest={}))
    bar.bar = SimpleNamespace(n=0, set_postfix_str=lambda text: seen.append(bar.bar.n))
    for step in range(1, 11):
        clock.now += seconds
        after(bar, step)
    assert seen == shown


@pytest.mark.parametrize(("seconds", "times"), [(60.0, 1), (0.5, 0)])
def test_a_long_wait_is_said_once(capsys, seconds, times):
    speed = SimpleNamespace(intervals=[])
    callback = SaysHowLong(speed, "flash_v2")
    after(callback, 1)
    speed.intervals = [Interval(1, seconds, 0.0, False)]
    after(callback, 2, 3, 4)
    assert capsys.readouterr().err.count("flash_v2 is interpreted on a CPU: 798 steps more will take about 13 h;") == times


def test_durations():
    assert [duration(s) for s in (5, 99, 720, 5400, 54_000)] == ["5 s", "99 s", "12 min", "90 min", "15 h"]


@pytest.mark.parametrize("signum", SIGNALS)
def test_every_signal_stops_between_two_steps(capfd, signum):
    before = signal.signal(signum, signal.SIG_DFL)
    stop = StopOnSignal(log_every=10)
    stop.on_train_start(at(5), None)
    after(stop, 6)
    os.kill(os.getpid(), signum)
    after(stop, 6)  # a batch within the window of a step
    with pytest.raises(Stopped, match=signum.name) as stopped:
        after(stop, 7)
    assert stopped.value.signum == signum and "stopping between two steps" in capfd.readouterr().err
    for one in SIGNALS:
        signal.signal(one, before if one == signum else stop.before[one])


def test_a_signal_in_the_last_validation_stops_the_run_after_it():
    stop = StopOnSignal(log_every=10)
    stop.on_train_start(at(799), None)
    os.kill(os.getpid(), signal.SIGTERM)
    after(stop, 800)  # the last step, which is validated first
    with pytest.raises(Stopped):
        stop.on_train_end(at(800), None)
    for signum, handler in stop.before.items():
        signal.signal(signum, handler)
