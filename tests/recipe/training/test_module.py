"""flash_ladder.training.module: the loss, clipping, and the stop before a loss that is not finite reaches the weights."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from flash_ladder.data.batches import TextData
from flash_ladder.training.module import GPTModule, LossWatch, NotFinite
from flash_ladder.training.run import train
from tests.helpers.tiny import tiny_config, values


def module(folder):
    cfg = tiny_config(folder)
    return GPTModule(asdict(replace(cfg, model=replace(cfg.model, vocab_size=320))), "eager")


def test_compiling_in_place_keeps_the_names_in_a_checkpoint(tmp_path):
    plain = module(tmp_path)
    cfg = {**plain.hparams["config"], "trainer": {**plain.hparams["config"]["trainer"], "compile": True}}
    compiled = GPTModule(cfg, "eager")
    compiled.configure_model()
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert all(name.startswith("net.") and "_orig_mod" not in name for name in plain.state_dict())


def test_hyperparameters_are_plain_data(tmp_path):
    torch.save(dict(module(tmp_path).hparams), tmp_path / "hparams.pt")
    assert torch.load(tmp_path / "hparams.pt", weights_only=True)["config"]["model"]["vocab_size"] == 320


@pytest.mark.parametrize("batch", [4, 5])  # the first and the second batch of step 3, of two each
def test_a_loss_that_is_not_finite_stops_before_its_step(tmp_path, monkeypatch, batch):
    cfg = tiny_config(tmp_path, accumulate=2, val_every=2)
    seen = []
    loss = GPTModule.loss

    def spoilt(self, data):
        value = loss(self, data)
        if self.training:
            seen.append([p.detach().clone() for p in self.parameters()])
            if len(seen) == batch + 1:
                modules.append(self)
                return value * math.nan
        return value

    modules = []
    monkeypatch.setattr(GPTModule, "loss", spoilt)
    with pytest.raises(NotFinite, match=r"loss is nan at step 3; .*optimizer\.lr \(now 0\.01\)"):
        train(cfg, tmp_path / "run")
    for before, after in zip(seen[batch], modules[0].parameters(), strict=True):
        assert torch.equal(before, after.detach())
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2  # the good one, from the validation after step 2
    assert list(values(tmp_path / "run", "train/loss")) == [1, 2]


def test_a_validation_loss_that_is_not_finite_writes_no_checkpoint(tmp_path, monkeypatch):
    loss = GPTModule.loss
    monkeypatch.setattr(GPTModule, "loss", lambda self, data: loss(self, data) * (1 if self.training else math.inf))
    with pytest.raises(NotFinite, match="validation loss is inf after step 3"):
        train(tiny_config(tmp_path), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize("grad_clip", [0.5, 0.0])
def test_gradients_are_clipped_to_their_global_norm(tmp_path, grad_clip):
    gpt = module(tmp_path)
    gpt.optimizer_config.grad_clip = grad_clip
    for p in gpt.parameters():
        p.grad = torch.ones_like(p)
    gpt.configure_gradient_clipping(None)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in gpt.parameters()))
    assert norm == pytest.approx(grad_clip or math.sqrt(gpt.net.n_params), rel=1e-4)


def test_loss_is_the_cross_entropy_of_the_next_token(tmp_path):
    cfg = tiny_config(tmp_path)
    data = TextData(cfg.data, seed=0, val_batches=1)
    data.prepare()
    gpt = module(tmp_path)
    batch = data.val_windows(2)
    logits = gpt.net(batch["tokens"][:, :-1])
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())
    assert torch.allclose(gpt.loss(batch), expected)


def test_the_watch_hands_over_each_loss_once():
    watch = LossWatch()
    for values_in in ([1.0, 2.0, 3.0], [4.0], [5.0, math.inf, 6.0]):
        for i, value in enumerate(values_in):
            watch.add(torch.tensor(value), ends_step=i == len(values_in) - 1)
        assert watch.take() == values_in
