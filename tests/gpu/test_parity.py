"""A whole model on the flash rungs against eager on the GPU: rounding stays within the limits that a wrong attention passes."""

import pytest
import torch

import flash_ladder.kernels.sdpa
from flash_ladder.export.parity import compare
from flash_ladder.machine.decide import DTYPES
from tests.helpers.made_up import VOCAB, sharp_model, unscaled
from tests.helpers.reference import skip_unless_runs

SHAPE = {"n_layer": 6, "n_head": 8, "n_kv_head": 4, "d_model": 512}


def windows() -> dict[str, torch.Tensor]:
    return {"tokens": torch.randint(VOCAB, (8, 1025), generator=torch.Generator().manual_seed(1))}


def model():
    net = sharp_model(**SHAPE)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 2:
                p.mul_(0.2)  # 0.06 each: at this width as sharp as the small ones are with 0.3
    return net.cuda()


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(
    "pair", [("flash_v2", "eager"), ("sdpa", "eager"), ("eager", "flash_v2"), ("flash_v2", "sdpa"), ("flash_v3", "eager")]
)
def test_backends_agree_to_rounding(pair, precision):
    for backend in pair:
        skip_unless_runs(backend, DTYPES[precision], SHAPE["d_model"] // SHAPE["n_head"])
    parity = compare(model(), windows(), backend=pair[0], against=pair[1], precision=precision)
    assert parity.within, parity.checks()
    assert parity.mean_kl > 0


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
def test_a_wrong_attention_is_beyond_tolerance(monkeypatch, precision):
    monkeypatch.setattr(flash_ladder.kernels.sdpa, "attend", unscaled)
    assert not compare(model(), windows(), backend="sdpa", precision=precision).within
