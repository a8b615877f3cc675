"""Loss and perplexity of windows, whatever the batch size and the chunks."""

import math

import pytest
import torch
import torch.nn.functional as F

from flash_ladder.errors import UserError
from flash_ladder.export import losses as evaluation
from flash_ladder.export.losses import evaluate
from flash_ladder.model.loss import perplexity
from tests.helpers.made_up import VOCAB, sharp_model


def windows(n: int = 5, seq_len: int = 24) -> dict[str, torch.Tensor]:
    return {"tokens": torch.randint(VOCAB, (n, seq_len + 1), generator=torch.Generator().manual_seed(1))}


def expected(model, windows) -> torch.Tensor:
    """Cross-entropy of each token, float64 [N, S], all at once."""
    tokens = windows["tokens"]
    logits = model(tokens[:, :-1], document_ids=windows.get("document_ids")).double()
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


@pytest.mark.parametrize("batch_size", [None, 1, 2, 7])
@pytest.mark.parametrize("chunk", [2**24, VOCAB * 7, 1])
@torch.no_grad()
def test_the_loss_is_the_mean_over_all_tokens(monkeypatch, batch_size, chunk):
    monkeypatch.setattr("flash_ladder.model.loss.CHUNK_ELEMENTS", chunk)
    model, data = sharp_model(), windows()
    found, losses = evaluate(model, data, backend="eager", batch_size=batch_size), expected(model, data)
    assert found.n_tokens == 5 * 24
    assert found.loss == pytest.approx(losses.mean().item(), abs=1e-6)
    assert found.window_losses == pytest.approx(losses.mean(1).tolist(), abs=1e-6)


@torch.no_grad()
def test_documents_are_kept_apart():
    model, data = sharp_model(), windows()
    apart = data | {"document_ids": (torch.arange(24, dtype=torch.int32) // 5).expand(5, -1)}
    losses = {name: evaluate(model, rows, backend="sdpa").loss for name, rows in (("whole", data), ("apart", apart))}
    assert losses["apart"] == pytest.approx(expected(model, apart).mean().item(), abs=1e-6)
    assert abs(losses["whole"] - losses["apart"]) > 1e-3


def test_precision_is_autocasts():
    model, seen = sharp_model(), []
    model.blocks[0].mlp.down.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    losses = {p: evaluate(model, windows(), backend="sdpa", precision=p).loss for p in ("32", "bf16-mixed", "16-mixed")}
    assert seen == [torch.float32, torch.bfloat16, torch.float16]
    assert 0 < abs(losses["bf16-mixed"] - losses["32"]) < 0.1


def test_batches_are_small_enough_for_their_logits(monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH_ELEMENTS", 2 * 24 * VOCAB)
    model, sizes = sharp_model(), []
    model.embedding.register_forward_pre_hook(lambda _, tokens: sizes.append(len(tokens[0])))
    evaluate(model, windows(), backend="eager")
    monkeypatch.setattr(evaluation, "BATCH_ELEMENTS", 1)
    evaluate(model, windows(2), backend="eager")
    assert sizes == [2, 2, 1, 1, 1]


def test_memory_that_does_not_suffice_is_said(monkeypatch):
    model = sharp_model()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 48 GiB")

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(UserError, match=r"eager attention does not fit .* 5 windows of 24 tokens; batch_size=1"):
        evaluate(model, windows(), backend="eager")
    with pytest.raises(UserError, match="seq_len=N"):
        evaluate(model, windows(), backend="eager", batch_size=1)


def test_perplexity():
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e4) == math.inf and math.isnan(perplexity(math.nan))
