"""From tokens to batches: windows, their order, its resumption under Lightning, and the ranks' shares."""

import itertools
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from flash_ladder.data.batches import LoadingLost, TrainingOrder, end_loading, ignore_signals
from flash_ladder.data.corpus import open_corpus
from flash_ladder.errors import UserError
from flash_ladder.schema import DataConfig
from tests.helpers.corpora import config, documents, refused, text_data, twenty_documents, write_txt
from tests.helpers.loading import as_rank, first_batches, fit


@pytest.fixture
def twenty(tmp_path) -> DataConfig:
    return twenty_documents(tmp_path)


# ---- windows ----


def test_windows_overlap_by_one_token(twenty):
    data = text_data(twenty)
    val = open_corpus(twenty, seed=0).val
    windows = data.val_windows(None)["tokens"]
    assert windows.dtype == torch.int64
    assert len(windows) == (len(val) - 1) // 16
    assert windows[:, :-1].flatten().tolist() == val.read(0, 16 * len(windows)).tolist()
    assert windows[:, 1:].flatten().tolist() == val.read(1, 16 * len(windows) + 1).tolist()
    assert data.val_windows(3)["tokens"].tolist() == windows[:3].tolist()


def test_last_window_needs_a_target_for_its_last_token(tmp_path):
    cfg = config(tmp_path, write_txt(tmp_path / "text", ["x" * 63] * 20))
    assert text_data(cfg).stats.n_val_tokens == 16 * 16
    assert len(text_data(cfg).val_windows(None)["tokens"]) == 15


def test_document_ids(tmp_path):
    cfg = config(tmp_path, write_txt(tmp_path / "text", documents(40, words=3)), document_ids=True)
    data = text_data(cfg)
    batch = next(iter(data.train_dataloader()))
    tokens, ids = batch["tokens"], batch["document_ids"]
    assert (ids.dtype, ids.shape) == (torch.int32, (4, 16))
    assert (ids[:, 0] == 0).all()
    after_end = (tokens[:, :-2] == data.tokenizer.eos_id).int()
    assert after_end.sum() > 0
    assert torch.equal(ids.diff(dim=1), after_end)
    assert "document_ids" not in next(iter(text_data(config(tmp_path, cfg.files)).train_dataloader()))


def test_shorter_than_a_window(tmp_path):
    files = write_txt(tmp_path / "text", ["a" * 100, "b" * 100])
    refused(config(tmp_path, files, seq_len=101, val_fraction=0.5), "training tokens, shorter than one window of 102")
    text_data(config(tmp_path, files, seq_len=100, val_fraction=0.5))  # 100 bytes and <|endoftext|>: one window exactly
    refused(config(tmp_path, files[0], seq_len=50), "validation part is 21 tokens, shorter than one window of 51")
    refused(config(tmp_path, write_txt(tmp_path / "tiny", ["a"])), "shorter than one window")


# ---- the order ----


def order_of(n_batches: int, n_windows: int = 11, batch_size: int = 2, **place) -> list[list[int]]:
    order = TrainingOrder(n_windows, batch_size, **{"seed": 0, "rank": 0, "world_size": 1, "first": 0, **place})
    return [batch for batch, _ in zip(order, range(n_batches), strict=False)]


def test_every_pass_is_a_permutation_of_its_own():
    entries = np.array(order_of(11)).flatten()
    passes = entries[:11].tolist(), entries[11:].tolist()
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(11))
    assert passes[0] != passes[1]
    assert np.array(order_of(11, seed=1)).flatten().tolist() != entries.tolist()


def test_ranks_share_the_sequence_out():
    alone = order_of(8, batch_size=6)
    shares = [order_of(8, rank=rank, world_size=3) for rank in range(3)]
    assert [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == alone


def test_order_from_a_later_window_on():
    assert order_of(5, first=9 * 2 * 2, rank=1, world_size=2) == order_of(14, rank=1, world_size=2)[9:]


def test_batches_do_not_depend_on_workers(twenty):
    expected = first_batches(text_data(twenty).train_dataloader(), 5)
    twenty.num_workers = 2
    assert torch.equal(first_batches(text_data(twenty).train_dataloader(), 5), expected)


def test_loaders_leave_the_global_random_state_alone(twenty):
    data = text_data(twenty)
    before = torch.get_rng_state()
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


# ---- ranks ----


def test_other_batches_on_other_devices_go_on_where_the_first_ones_stopped(twenty):
    """Three steps of two batches of four on one device, then batches of three on two: no window twice, none left out."""
    alone = as_rank(text_data(twenty, accumulate=2), 0, 1, global_step=0)
    in_order = first_batches(alone.train_dataloader(), 12).flatten(0, 1)
    as_rank(alone, 0, 1, global_step=3)
    later = []
    for rank in range(2):
        data = as_rank(text_data(replace(twenty, batch_size=3)), rank, 2, global_step=3)
        data.load_state_dict(alone.state_dict())
        later.append(first_batches(data.train_dataloader(), 3))
        as_rank(data, rank, 2, global_step=5)
        assert data.state_dict() == {"step": 5, "tokens": (3 * 2 * 4 + 2 * 2 * 3) * 16}
    assert torch.equal(torch.stack(later, dim=1).flatten(0, 2), in_order[24:42])


@pytest.mark.parametrize("world_size, val_batches", [(1, 3), (2, 4), (3, 4), (3, 1), (2, 10**6)])
def test_ranks_share_the_first_validation_windows(twenty, world_size, val_batches):
    data = text_data(twenty, val_batches=val_batches)
    shares = [[batch["tokens"] for batch in as_rank(data, rank, world_size).val_dataloader()] for rank in range(world_size)]
    assert len({tuple(len(batch) for batch in share) for share in shares}) == 1
    seen = torch.cat([torch.cat(batches) for batches in zip(*shares, strict=True)])
    n_windows = min(4 * val_batches, len(data.val_windows(None)["tokens"]))
    assert n_windows - len(seen) < min(4, n_windows // world_size) * world_size
    assert torch.equal(seen, data.val_windows(len(seen))["tokens"])


def test_ranks_that_share_sequences_read_as_one(twenty):
    for rank in range(4):
        shared, alone = text_data(twenty, context_parallel=2), text_data(twenty)
        as_rank(shared, rank, 4, global_step=3)
        as_rank(alone, rank // 2, 2, global_step=3)
        assert torch.equal(first_batches(shared.train_dataloader(), 3), first_batches(alone.train_dataloader(), 3))
        for ours, theirs in zip(shared.val_dataloader(), alone.val_dataloader(), strict=True):
            assert torch.equal(ours["tokens"], theirs["tokens"])
        assert shared.state_dict() == alone.state_dict()


def test_too_few_validation_windows_for_the_devices(twenty):
    with pytest.raises(UserError, match="for 5 devices"):
        as_rank(text_data(twenty, val_batches=1), 0, 5).val_dataloader()


# ---- resuming under Lightning ----


@pytest.mark.filterwarnings("ignore")  # Lightning would like more workers
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_training_sees_the_same_batches(tmp_path, twenty, num_workers, accumulate):
    twenty.num_workers = num_workers
    whole, _ = fit(tmp_path, text_data(twenty, accumulate=accumulate), 6)
    before, checkpoint = fit(tmp_path, text_data(twenty, accumulate=accumulate), 3)
    after, _ = fit(tmp_path, text_data(twenty, accumulate=accumulate), 6, resume=checkpoint)
    assert len(whole) == 6 * accumulate
    assert before + after == whole


# ---- loading processes ----


def test_a_loading_process_that_dies_is_noticed_where_a_batch_is_waited_for(twenty):
    twenty.num_workers = 1
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(text_data(twenty).train_dataloader())
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == handler  # torch's own would raise wherever the main thread is
    (process,) = multiprocessing.active_children()
    os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.2)
    with pytest.raises(LoadingLost):
        list(itertools.islice(batches, 20))


def stubborn(ready) -> None:
    ignore_signals(0)
    ready.set()
    time.sleep(60)


def test_what_is_left_of_loading_is_killed():
    """It ignores SIGTERM, with which Python would end it."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=stubborn, args=(ready,), daemon=True)
    process.start()
    ready.wait(10)
    process.terminate()
    process.join(0.2)
    assert process.is_alive()
    end_loading()
    process.join(5)
    assert process.exitcode == -signal.SIGKILL
