"""flash_ladder.training.masters: bf16 weights beside float32 masters."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from flash_ladder.errors import UserError
from flash_ladder.machine.decide import decide
from flash_ladder.training.masters import MasterWeights
from flash_ladder.training.run import train
from tests.helpers.tiny import tiny_config, values


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4))


def test_weights_are_bf16_and_the_masters_are_what_they_were():
    model, right = net(), net()
    masters = MasterWeights(model)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert list(masters.masters) == [name for name, _ in right.named_parameters()]
    for name, weight in right.named_parameters():
        assert torch.equal(masters.masters[name], weight)
        assert torch.equal(dict(model.named_parameters())[name], weight.bfloat16())


def test_gradients_of_several_batches_add_up_in_float32():
    model = net()
    masters = MasterWeights(model)
    wanted = {name: torch.zeros_like(master) for name, master in masters.masters.items()}
    for seed in range(20):
        torch.manual_seed(seed)
        model(torch.randn(32, 8).bfloat16()).float().square().mean().backward()
        for name, weight in model.named_parameters():
            wanted[name] += weight.grad.float()
        masters.add_gradients()
        assert all(weight.grad is None for weight in model.parameters())
    for name, master in masters.masters.items():
        assert master.grad.dtype == torch.float32
        torch.testing.assert_close(master.grad, wanted[name], rtol=1e-6, atol=1e-7)


def test_steps_smaller_than_bf16_can_tell_are_not_lost():
    model = net()
    masters = MasterWeights(model)
    before = {name: master.detach().clone() for name, master in masters.masters.items()}
    optimizer = torch.optim.SGD(masters.masters.values(), lr=1.0)
    optimizer.register_step_post_hook(masters.publish)
    for _ in range(1000):
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, 1e-5)
        masters.add_gradients()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(masters.masters[name], before[name] - 1e-2, rtol=0, atol=2e-5)
        assert torch.equal(weight, masters.masters[name].bfloat16())


def test_a_state_is_the_masters_and_sets_both():
    model, plain = net(), net()
    masters = MasterWeights(model)
    state = model.state_dict()
    plain.load_state_dict(state)
    assert all(torch.equal(state[name], master) for name, master in masters.masters.items())
    other = {name: torch.randn_like(master) for name, master in state.items()}
    model.load_state_dict(other)
    for name, weight in model.named_parameters():
        assert torch.equal(masters.masters[name], other[name]) and torch.equal(weight, other[name].bfloat16())
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(other | {"1.weight": torch.zeros(4, 15)})


# ---- a run ----


def with_masters(folder, **trainer):
    return tiny_config(folder, precision="bf16-mixed", master_weights=True, **trainer)


def test_a_run_trains_as_under_autocast_and_leaves_the_same_files(tmp_path):
    for name in ("mixed", "masters"):
        cfg = with_masters(tmp_path) if name == "masters" else tiny_config(tmp_path, precision="bf16-mixed")
        train(cfg, tmp_path / name)
    mixed, masters = (values(tmp_path / name, "val/loss") for name in ("mixed", "masters"))
    assert masters == pytest.approx(mixed, abs=0.02) and masters[6] < masters[3]
    weights = [torch.load(tmp_path / n / "checkpoints" / "last.ckpt", weights_only=True) for n in ("mixed", "masters")]
    kinds = [{name: (x.dtype, x.shape) for name, x in found["state_dict"].items()} for found in weights]
    assert kinds[0] == kinds[1] and {dtype for dtype, _ in kinds[1].values()} == {torch.float32}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_goes_on_to_the_same_bits(tmp_path, accumulate):
    whole = with_masters(tmp_path, accumulate=accumulate)
    train(whole, tmp_path / "whole")
    short = with_masters(tmp_path, accumulate=accumulate, max_steps=3)
    train(short, tmp_path / "parts")
    train(replace(whole, resume=str(tmp_path / "parts")), tmp_path / "parts")
    assert values(tmp_path / "parts", "train/loss") == values(tmp_path / "whole", "train/loss")
    assert values(tmp_path / "parts", "val/loss") == values(tmp_path / "whole", "val/loss")


def test_a_run_under_autocast_goes_on_with_masters(tmp_path):
    train(tiny_config(tmp_path, precision="bf16-mixed", max_steps=3), tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    train(replace(with_masters(tmp_path), resume=str(tmp_path / "other")), tmp_path / "other")
    train(replace(tiny_config(tmp_path, precision="bf16-mixed"), resume=str(tmp_path / "run")), tmp_path / "run")
    assert values(tmp_path / "other", "val/loss")[6] == pytest.approx(values(tmp_path / "run", "val/loss")[6], abs=0.02)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"precision": "32"}, "trainer.master_weights=true is for bf16, not for trainer.precision=32; bf16-mixed would work"),
        ({"precision": "bf16-mixed", "devices": 2}, "trainer.master_weights=true runs on one device"),
        ({"precision": "bf16-mixed", "strategy": "fsdp"}, "trainer.master_weights=true runs on one device"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path, trainer, message):
    with pytest.raises(UserError, match=message):
        decide(tiny_config(tmp_path, master_weights=True, **trainer))
