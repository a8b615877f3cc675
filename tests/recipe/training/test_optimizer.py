"""flash_ladder.training.optimizer: the schedule, what decays, and AdamW as it is configured."""

import pytest
import torch

from flash_ladder.model.gpt import GPT
from flash_ladder.model_schema import ModelConfig
from flash_ladder.schema import OptimizerConfig
from flash_ladder.training.optimizer import build_optimizer, build_schedule, lr_factor, weight_decay_groups


def test_learning_rate_rises_in_a_line_and_falls_along_a_cosine_to_its_ratio():
    cfg = OptimizerConfig(warmup_steps=4, min_lr_ratio=0.1)
    factor = [lr_factor(step, cfg, max_steps=15) for step in range(15)]
    assert factor[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor[9] == pytest.approx(0.55)  # half way between step 4 and step 14
    assert factor[14] == pytest.approx(0.1)
    assert factor[4:] == sorted(factor[4:], reverse=True)
    assert lr_factor(40, cfg, 15) == pytest.approx(0.1)
    assert lr_factor(3, OptimizerConfig(warmup_steps=10), 4) == pytest.approx(4 / 11)  # a run that ends while warming up


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.7, 0.4, 0.1]),  # falls over 3 of 11 steps
        ("constant", [0.5] + [1.0] * 10),
    ],
)
def test_other_schedules(schedule, expected):
    cfg = OptimizerConfig(warmup_steps=1, min_lr_ratio=0.1, schedule=schedule, decay_ratio=0.3)
    assert [lr_factor(step, cfg, 11) for step in range(12)] == pytest.approx([*expected, expected[-1]])


def test_matrices_decay_and_vectors_do_not():
    net = GPT(ModelConfig(n_layer=1, n_head=2, n_kv_head=1, d_model=32, vocab_size=320))
    decayed, kept = weight_decay_groups(net.parameters(), 0.1)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    kept_names = {name for name, p in net.named_parameters() if any(p is k for k in kept["params"])}
    assert kept_names == {"blocks.0.attention_norm.weight", "blocks.0.mlp_norm.weight", "norm.weight"}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(net.parameters()))


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_follows_its_configuration_and_the_schedule(fused):
    cfg = OptimizerConfig(lr=0.5, warmup_steps=1, min_lr_ratio=0.1, beta1=0.8, beta2=0.7, weight_decay=0.2)
    optimizer = build_optimizer(dict(torch.nn.Linear(3, 2).named_parameters()), cfg, fused=fused)
    assert [(group["betas"], group["weight_decay"], group["fused"]) for group in optimizer.param_groups] == [
        ((0.8, 0.7), 0.2, fused),
        ((0.8, 0.7), 0.0, fused),
    ]
    schedule, rates = build_schedule(optimizer, cfg, max_steps=4), []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.5 * lr_factor(step, cfg, 4) for step in range(4)])


def tiny_net():
    torch.manual_seed(0)
    return GPT(ModelConfig(n_layer=1, n_head=2, n_kv_head=1, d_model=32, vocab_size=320, norm="layernorm", bias=True))


def trained(net, optimizer, n_steps):
    schedule = build_schedule(optimizer, MUON, max_steps=10)
    tokens = torch.arange(40).view(2, 20)
    for _ in range(n_steps):
        optimizer.zero_grad()
        net(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        schedule.step()
    return net.state_dict()


MUON = OptimizerConfig(name="muon", lr=0.01, warmup_steps=2, weight_decay=0.3, momentum=0.9, beta2=0.95)


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    """Beside the two optimisers by hand, each on its own parameters."""
    net, apart = tiny_net(), tiny_net()
    matrices = {name for name, p in net.named_parameters() if p.dim() == 2 and name.startswith("blocks.")}
    assert matrices == {f"blocks.0.{part}.weight" for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")}
    optimizer = build_optimizer(dict(net.named_parameters()), MUON, fused=False)
    named = dict(apart.named_parameters())
    tables = [p for name, p in named.items() if p.dim() == 2 and name not in matrices]
    vectors = [p for p in named.values() if p.dim() == 1]
    by_hand = [
        torch.optim.Muon(
            [named[name] for name in named if name in matrices],
            lr=0.01, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [{"params": tables, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95)
        ),
    ]  # fmt: skip
    tokens = torch.arange(40).view(2, 20)
    for step in range(4):
        for one in by_hand:
            one.zero_grad()
            for group in one.param_groups:
                group["lr"] = 0.01 * lr_factor(step, MUON, 10)
        apart(tokens[:, :-1], tokens[:, 1:]).backward()
        for one in by_hand:
            one.step()
    torch.testing.assert_close(trained(net, optimizer, 4), apart.state_dict(), rtol=0, atol=0)


def test_muon_goes_on_from_its_state():
    whole, first, second = tiny_net(), tiny_net(), tiny_net()
    right = trained(whole, build_optimizer(dict(whole.named_parameters()), MUON, fused=False), 5)
    optimizer = build_optimizer(dict(first.named_parameters()), MUON, fused=False)
    trained(first, optimizer, 3)
    again = build_optimizer(dict(second.named_parameters()), MUON, fused=False)
    second.load_state_dict(first.state_dict())
    again.load_state_dict(optimizer.state_dict())
    schedule = build_schedule(again, MUON, 10)
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": 3})
    tokens = torch.arange(40).view(2, 20)
    for step in (3, 4):
        for group in again.param_groups:
            group["lr"] = 0.01 * lr_factor(step, MUON, 10)
        again.zero_grad()
        second(tokens[:, :-1], tokens[:, 1:]).backward()
        again.step()
    torch.testing.assert_close(second.state_dict(), right, rtol=0, atol=0)
