"""flash_ladder.model.loss: training's mean and evaluation's losses token by token are one loss."""

import pytest
import torch

from flash_ladder.model.loss import IGNORED, mean_loss, token_losses


def some(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, 11, generator=generator).mul(4).to(dtype)
    return logits, torch.randint(11, (2, 5), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 22, 2**24])
def test_the_mean_is_of_the_losses_token_by_token(monkeypatch, dtype, chunk):
    monkeypatch.setattr("flash_ladder.model.loss.CHUNK_ELEMENTS", chunk)
    logits, targets = some(dtype)
    losses = token_losses(logits, targets)
    right = -logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(losses.double(), right, rtol=1e-5, atol=1e-5)
    assert losses.dtype == mean_loss(logits, targets).dtype == torch.float32
    torch.testing.assert_close(mean_loss(logits, targets), losses.mean())


def test_an_ignored_target_is_left_out_of_the_mean():
    logits, targets = some()
    kept = token_losses(logits, targets)[:, :3].mean()
    targets[:, 3:] = IGNORED
    torch.testing.assert_close(mean_loss(logits, targets), kept)
    assert mean_loss(logits, targets.fill_(IGNORED)).isnan()
