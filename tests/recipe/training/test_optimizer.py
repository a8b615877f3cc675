"""flash_ladder.training.optimizer: the schedule, what decays, and AdamW as it is configured."""

import pytest
import torch

from flash_ladder.model.gpt import GPT
from flash_ladder.schema import ModelConfig, OptimizerConfig
from flash_ladder.training.optimizer import build_optimizer, build_schedule, lr_factor, weight_decay_groups


def test_learning_rate_rises_in_a_line_and_falls_along_a_cosine_to_its_ratio():
    factor = [lr_factor(step, warmup_steps=4, max_steps=15, min_lr_ratio=0.1) for step in range(15)]
    assert factor[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor[9] == pytest.approx(0.55)  # half way between step 4 and step 14
    assert factor[14] == pytest.approx(0.1)
    assert factor[4:] == sorted(factor[4:], reverse=True)
    assert lr_factor(40, 4, 15, 0.1) == pytest.approx(0.1)
    assert lr_factor(3, 10, 4, 0.1) == pytest.approx(4 / 11)  # a run that ends while warming up


def test_matrices_decay_and_vectors_do_not():
    net = GPT(ModelConfig(n_layer=1, n_head=2, n_kv_head=1, d_model=32, vocab_size=320))
    decayed, kept = weight_decay_groups(net, 0.1)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    kept_names = {name for name, p in net.named_parameters() if any(p is k for k in kept["params"])}
    assert kept_names == {"blocks.0.attention_norm.weight", "blocks.0.mlp_norm.weight", "norm.weight"}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(net.parameters()))


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_follows_its_configuration_and_the_schedule(fused):
    cfg = OptimizerConfig(lr=0.5, warmup_steps=1, min_lr_ratio=0.1, beta1=0.8, beta2=0.7, weight_decay=0.2)
    optimizer = build_optimizer(torch.nn.Linear(3, 2), cfg, fused=fused)
    assert [(group["betas"], group["weight_decay"], group["fused"]) for group in optimizer.param_groups] == [
        ((0.8, 0.7), 0.2, fused),
        ((0.8, 0.7), 0.0, fused),
    ]
    schedule, rates = build_schedule(optimizer, cfg, max_steps=4), []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.5 * lr_factor(step, 1, 4, 0.1) for step in range(4)])
