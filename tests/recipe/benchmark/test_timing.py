"""One call of the benchmark: its inputs, and what is said where it fails. Times need a GPU."""

import weakref

import pytest
import torch

import flash_ladder.benchmark.timing as module
from flash_ladder.benchmark.peers import NotInstalled
from flash_ladder.benchmark.result import Panel
from flash_ladder.benchmark.timing import NoBackward, backward_milliseconds, failure_note, random_inputs
from flash_ladder.kernels import Unsupported
from flash_ladder.script_schema import BenchmarkConfig


def test_inputs():
    cfg = BenchmarkConfig(width=64, dtype="float32")
    inputs, grad_output = random_inputs(cfg, Panel(True, 16, 2), 3, 8, torch.device("cpu"))
    assert [tuple(x.shape) for x in inputs] == [(3, 4, 8, 16), (3, 2, 8, 16), (3, 2, 8, 16)]
    assert grad_output.shape == inputs[0].shape and all(x.requires_grad for x in inputs)


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (NotInstalled("not installed"), "not installed"),
        (NoBackward("no backward: not built"), "no backward: not built"),
        (Unsupported("no such head_dim"), "refused: no such head_dim"),
        (RuntimeError("two\nlines"), "failed: RuntimeError: two lines"),
        (AssertionError(), "failed: AssertionError:"),
    ],
)
def test_what_went_wrong_in_words(error, note):
    def work():
        raise error

    assert failure_note(work) == note
    assert failure_note(lambda: None) == ""


def test_the_time_of_a_backward_that_is_none(monkeypatch):
    monkeypatch.setattr(module, "median_milliseconds", lambda prepare, call, budget: call(prepare()))
    x = torch.ones(2, requires_grad=True)
    assert backward_milliseconds(lambda x: 3 * x, [x], torch.ones(2), 1.0)[0].tolist() == [3, 3]
    with pytest.raises(NoBackward, match=r"^no backward$"):
        backward_milliseconds(lambda x: x.detach(), [x], torch.ones(2), 1.0)


def test_a_failed_call_gives_the_memory_back():
    left = []

    def work():
        held = torch.empty(10)
        left.append(weakref.ref(held))
        raise torch.OutOfMemoryError("none left")

    failure_note(work)
    assert left[0]() is None


def test_an_interruption_is_no_note():
    def work():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failure_note(work)
