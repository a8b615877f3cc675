"""What follows from the configuration in Python: the batch that makes up data.tokens_per_step."""

from dataclasses import replace

import pytest

from flash_ladder.errors import UserError
from flash_ladder.schema import Config, batching, with_batch_size


@pytest.mark.parametrize(("seq_len", "n_devices"), [(2**k, n) for n in (1, 2, 4) for k in range(10, 19) if 2**k * n <= 2**18])
def test_a_step_has_as_many_tokens_at_every_length(seq_len, n_devices):
    batch_size, accumulate = batching(2**18, seq_len, 8, n_devices)
    assert batch_size * accumulate * seq_len * n_devices == 2**18
    assert accumulate == min(8, 2**18 // (seq_len * n_devices))


def test_the_step_is_cut_as_asked_and_shrinks_to_one_sequence():
    assert batching(262144, 1024, 8, 1) == (32, 8) and batching(262144, 1024, 8, 2) == (16, 8)
    assert batching(262144, 65536, 8, 1) == (1, 4) and batching(262144, 262144, 8, 1) == (1, 1)
    assert batching(300, 100, 8, 1) == (1, 3) and batching(300, 100, 1, 1) == (3, 1)


@pytest.mark.parametrize(
    ("asked", "works", "says"),
    [
        ((1000, 128, 1, 1), 1024, "data.seq_len=128;"),
        ((100, 128, 8, 1), 128, "data.seq_len=128;"),  # less than a sequence
        ((128, 128, 8, 2), 256, "data.seq_len=128 on 2 devices;"),
        ((128 * 13, 128, 8, 1), 128 * 16, "data.seq_len=128 in 8 batches a step;"),
        ((128 * 9, 128, 8, 1), 128 * 8, "in 8 batches a step;"),
        ((1, 128, 8, 4), 512, "on 4 devices;"),
        ((128, 128, 8, 8, 4), 256, "on 8 devices, 4 to a sequence;"),
    ],
)
def test_what_does_not_come_out_names_the_nearest_that_does(asked, works, says):
    with pytest.raises(UserError, match=f"data.tokens_per_step={works} would work") as refused:
        batching(*asked)
    assert says in str(refused.value)
    batching(works, *asked[1:])


def test_tokens_per_step_wins_over_the_batch_size():
    cfg = Config()
    assert with_batch_size(cfg, 2) is cfg
    asked = replace(cfg, data=replace(cfg.data, tokens_per_step=4096, batch_size=3), trainer=replace(cfg.trainer, accumulate=4))
    found = with_batch_size(asked, 2)
    assert (found.data.batch_size, found.trainer.accumulate, found.data.tokens_per_step) == (4, 4, 4096)
    assert with_batch_size(found, 2) == found  # the configuration that a run saves means the same again


def test_what_cannot_come_out_on_any_number_of_devices_is_refused_at_once():
    cfg = Config()
    with pytest.raises(UserError, match=r"data\.tokens_per_step=1000 "):
        replace(cfg, data=replace(cfg.data, tokens_per_step=1000)).validate()
    with pytest.raises(UserError, match=r"data\.tokens_per_step=0 must be at least 1"):
        replace(cfg, data=replace(cfg.data, tokens_per_step=0)).validate()
