"""flash_ladder.model.loss: training's mean and evaluation's losses token by token are one loss."""

import pytest
import torch
import torch.nn.functional as F

from flash_ladder.kernels import cross_entropy
from flash_ladder.model import loss
from flash_ladder.model.gpt import GPT
from flash_ladder.model.loss import IGNORED, mean_loss, mean_loss_in_pieces, token_losses
from flash_ladder.model_schema import ModelConfig


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


def test_float64_logits_give_float64_losses():
    logits, targets = some(torch.float64)
    right = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(token_losses(logits, targets), right, rtol=1e-13, atol=1e-13)


def test_an_ignored_target_is_left_out_of_the_mean():
    logits, targets = some()
    kept = token_losses(logits, targets)[:, :3].mean()
    targets[:, 3:] = IGNORED
    torch.testing.assert_close(mean_loss(logits, targets), kept)
    assert mean_loss(logits, targets.fill_(IGNORED)).isnan()


# ---- in pieces ----


def head(n=50, width=16, words=40, seed=0):
    """Hidden states [2, n, width], a head [words, width] and targets [2, n], some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, n, width, generator=generator, requires_grad=True)
    weight = torch.randn(words, width, generator=generator, requires_grad=True)
    targets = torch.randint(words, (2, n), generator=generator)
    targets[0, ::7] = IGNORED
    return hidden, weight, targets


@pytest.mark.parametrize("rows", [1, 7, 100, 1000])
def test_pieces_give_the_loss_and_the_gradients_of_the_whole(rows):
    hidden, weight, targets = head()
    whole, pieces = mean_loss(F.linear(hidden, weight), targets), mean_loss_in_pieces(hidden, weight, targets, rows)
    torch.testing.assert_close(pieces, whole)
    found, right = (torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (pieces, whole))
    torch.testing.assert_close(found, right)
    with torch.no_grad():
        torch.testing.assert_close(mean_loss_in_pieces(hidden, weight, targets, rows), whole)


def test_pieces_under_autocast_are_as_exact_as_the_whole():
    hidden, weight, targets = head(n=512, width=64, words=300)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    right = torch.autograd.grad(F.cross_entropy(F.linear(*exact).flatten(0, 1), targets.flatten(), ignore_index=IGNORED), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = mean_loss(F.linear(hidden, weight), targets), mean_loss_in_pieces(hidden, weight, targets, 16)
    assert losses[0].dtype == losses[1].dtype == torch.float32
    errors = [
        [
            (grad - wanted).norm() / wanted.norm()
            for grad, wanted in zip(torch.autograd.grad(loss, (hidden, weight)), right, strict=True)
        ]
        for loss in losses
    ]
    for whole, pieces in zip(*errors, strict=True):
        assert pieces < 1.1 * whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_and_pytorch_give_the_same(dtype):
    """Of a row: a piece in PyTorch's operations and in the kernel that a GPU runs."""
    logits, targets = some(dtype)
    pieces = [logits.flatten(0, 1).clone() for _ in range(2)]
    targets = targets.flatten().index_fill(0, torch.tensor(3), IGNORED)
    losses = loss.losses_and_gradient(pieces[0], targets, True)
    torch.testing.assert_close(losses, cross_entropy.losses_and_gradient(pieces[1], targets, IGNORED, differentiate=True))
    torch.testing.assert_close(*pieces)


def test_pieces_where_every_target_is_ignored():
    hidden, weight, targets = head()
    assert mean_loss_in_pieces(hidden, weight, torch.full_like(targets, IGNORED), 7).isnan()


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_trains_the_same_in_pieces(tied):
    torch.manual_seed(0)
    net = GPT(ModelConfig(n_layer=1, n_head=2, n_kv_head=1, d_model=32, vocab_size=64, tie_embeddings=tied))
    tokens = torch.randint(64, (2, 17))
    found = []
    for rows in (None, 5):
        net.loss_rows = rows
        loss = net(tokens[:, :-1], tokens[:, 1:])
        found.append((loss, *torch.autograd.grad(loss, list(net.parameters()))))
    torch.testing.assert_close(*found)


def test_pieces_compile_in_one_graph():
    torch._dynamo.reset()
    hidden, weight, targets = head()
    compiled = torch.compile(lambda *x: mean_loss_in_pieces(*x, targets, 7), fullgraph=True, backend="aot_eager")
    found, right = (
        torch.autograd.grad(f(hidden, weight), (hidden, weight)) for f in (compiled, lambda *x: mean_loss(F.linear(*x), targets))
    )
    torch.testing.assert_close(found, right)
