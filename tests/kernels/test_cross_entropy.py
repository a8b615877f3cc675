"""flash_ladder.kernels.cross_entropy: the loss of each row and the gradient in its place, against float64."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from flash_ladder.kernels import cross_entropy
from flash_ladder.kernels.cross_entropy import losses_and_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = -100


def rows(n=7, words=100, dtype=torch.float32, size=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, words, generator=generator).mul(size).to(dtype).to(DEVICE)
    return logits, torch.randint(words, (n,), generator=generator).to(DEVICE)


def exact(logits, targets):
    """Losses and gradient in float64 of the logits as they are rounded."""
    x = logits.double().requires_grad_()
    losses = F.cross_entropy(x, targets, ignore_index=IGNORED, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]


def in_place(logits, targets):
    return losses_and_gradient(logits, targets, IGNORED, differentiate=True)


@pytest.mark.parametrize("words", [1, 31, 64, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradient(monkeypatch, words, dtype):
    monkeypatch.setattr(cross_entropy, "BLOCK", 64)
    logits, targets = rows(words=words, dtype=dtype)
    targets[2] = IGNORED
    losses, gradient = exact(logits, targets)
    found = in_place(logits, targets)
    torch.testing.assert_close(found.double(), losses, rtol=1e-6, atol=2e-6)
    unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(logits.double(), gradient, rtol=unit + 2e-6, atol=1e-7 if dtype == torch.float16 else 1e-12)
    assert found.dtype == torch.float32 and not logits[2].any()


def test_logits_stay_where_no_gradient_is_asked_for():
    logits, targets = rows()
    before = logits.clone()
    losses_and_gradient(logits, targets, IGNORED, differentiate=False)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("size", [1e-6, 1e4, 1e30])
def test_small_and_huge_logits(monkeypatch, size):
    monkeypatch.setattr(cross_entropy, "BLOCK", 16)
    logits, targets = rows(size=size)
    losses, gradient = exact(logits, targets)
    torch.testing.assert_close(in_place(logits, targets).double(), losses, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=2e-6, atol=1e-6 if size > 1 else 1e-12)


def test_logits_that_are_not_finite(monkeypatch):
    """-inf is a token of no probability, also where a whole block is; nan and inf reach the loss, which then ends a run."""
    monkeypatch.setattr(cross_entropy, "BLOCK", 16)
    logits, targets = rows(n=4, words=40)
    targets.fill_(35)
    logits[0, :20], logits[0, 36:] = -torch.inf, -torch.inf
    logits[1, 3], logits[2, 3] = torch.nan, torch.inf
    losses, gradient = exact(logits[:1], targets[:1])
    found = in_place(logits, targets)
    torch.testing.assert_close(found[:1].double(), losses, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(logits[:1].double(), gradient, rtol=2e-6, atol=1e-12)
    assert found.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("target", [-1, 100, 2**40])
def test_a_target_outside_of_the_vocabulary_gives_nan(target):
    logits, targets = rows()
    targets[3] = target
    found = in_place(logits, targets)
    assert found.isnan().tolist() == [i == 3 for i in range(7)]


def test_rows_that_lie_apart():
    logits, targets = rows()
    wide = torch.full((7, 130), 5.0, device=DEVICE)
    wide[:, :100] = logits
    part = wide[:, :100]
    torch.testing.assert_close(
        in_place(part, targets),
        in_place(logits, targets),
    )
    assert torch.equal(part, logits) and (wide[:, 100:] == 5).all()
    assert in_place(logits[:0], targets[:0]).shape == (0,)


COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flash_ladder.kernels import cross_entropy
from tests.helpers.aot import read
for capability, kind in ((75, "fp16"), (80, "bf16"), (90, "bf16"), (90, "fp32"), (120, "bf16")):
    types = {"LOGITS": "*" + kind, "TARGETS": "*i64", "LOSSES": "*fp32", "DIFFERENTIATE": "constexpr", "BLOCK": "constexpr"}
    signature = {name: types.get(name, "i32") for name in cross_entropy._kernel.arg_names}
    constants = {"DIFFERENTIATE": True, "BLOCK": cross_entropy.BLOCK}
    source = ASTSource(cross_entropy._kernel, signature=signature, constexprs=constants, attrs={(0,): [["tt.divisibility", 16]]})
    target = GPUTarget("cuda", capability, 32)
    print(json.dumps(read(triton.compile(source, target=target, options={"num_warps": cross_entropy.WARPS}))))
"""


def test_it_compiles_for_every_generation_and_keeps_a_block_in_registers():
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == 5 and all(kernel["stack"] == 0 and kernel["registers"] <= 128 for kernel in found), found
