"""kernels.doors.transformers: small random models of several families, beside their own eager attention."""

import pytest
import torch
import transformers as hf

from flash_ladder.kernels.doors.transformers import register, run_layer

SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
BASE = SHAPE | {"head_dim": 16, "vocab_size": 96, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "attention_dropout": 0.0}
MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**BASE)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**BASE, sliding_window=5)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**BASE, **MIXED, use_sliding_window=True)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**BASE, **MIXED, query_pre_attn_scalar=16, attn_logit_softcapping=2.0)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**BASE, **MIXED, num_local_experts=2, num_experts_per_tok=1)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, pad_token_id=0, eos_token_id=1, bos_token_id=2)),
}
TOKENS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
PADDING = {
    "none": None,
    "left": torch.tensor([[0] * 5 + [1] * 11, [1] * 16]),
    "right": torch.tensor([[1] * 16, [1] * 9 + [0] * 7]),
}


@pytest.fixture(scope="module", autouse=True)
def _door():
    register()
    register("ladder_v2", backend="flash_v2")


def made(family):
    """A model whose weights are large enough that every part of it matters."""
    torch.manual_seed(1)
    model = MODELS[family]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.15)
    return model


def results(model, implementation, mask=None, **inputs):
    """Logits and loss of the tokens that count, and every gradient."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    counts = torch.ones_like(TOKENS, dtype=torch.bool) if mask is None else mask.bool()
    read = counts & counts.roll(1, 1)  # a token is predicted at the position before it
    output = model(TOKENS, attention_mask=mask, labels=TOKENS.masked_fill(~read, -100), **inputs)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.logits[counts], output.loss, gradients


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("family", MODELS)
def test_it_trains_as_eager(family, padding):
    model, mask = made(family), PADDING[padding]
    right, found = (results(model, implementation, mask) for implementation in ("eager", "ladder"))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("padding", PADDING)
def test_it_trains_as_eager_on_a_rung(padding):
    model, mask = made("mistral"), PADDING[padding]
    right, found = (results(model, implementation, mask) for implementation in ("eager", "ladder_v2"))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_packed_rows_stay_apart(family):
    model = made(family)
    positions = torch.cat([torch.arange(n) for n in (7, 1, 8)])[None].expand(2, -1)
    right, found = (results(model, name, position_ids=positions, use_cache=False) for name in ("eager", "ladder"))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(found[0], results(model, "ladder")[0], atol=1e-2)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", MODELS)
def test_it_generates_as_eager(family, padding):
    model, mask = made(family), PADDING[padding]
    texts = []
    for implementation in ("eager", "ladder"):
        model.set_attn_implementation(implementation)
        mask = torch.ones_like(TOKENS) if mask is None else mask
        texts.append(model.generate(TOKENS, attention_mask=mask, max_new_tokens=8, do_sample=False))
    assert torch.equal(*texts)


def test_it_generates_with_a_cache_of_fixed_size():
    model, texts = made("qwen3"), []
    for implementation in ("eager", "ladder"):
        model.set_attn_implementation(implementation)
        options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
        texts.append(model.generate(TOKENS, attention_mask=PADDING["left"], **options))
    assert torch.equal(*texts)


def test_several_tokens_at_once_behind_a_cache():
    model, mask = made("mistral"), PADDING["left"]
    logits = []
    for implementation in ("eager", "ladder"):
        model.set_attn_implementation(implementation)
        cache = model(TOKENS[:, :9], attention_mask=mask[:, :9]).past_key_values
        logits.append(model(TOKENS[:, 9:], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("padding", PADDING)
def test_an_encoder_sees_everything_but_padding(padding):
    torch.manual_seed(0)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    model = hf.BertModel(hf.BertConfig(**{name: SHAPE[name] for name in names}, vocab_size=96)).eval()
    states, mask = [], PADDING[padding]
    for implementation in ("eager", "ladder"):
        model.set_attn_implementation(implementation)
        states.append(model(TOKENS, attention_mask=mask).last_hidden_state[slice(None) if mask is None else mask.bool()])
    torch.testing.assert_close(*states, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_it_compiles_in_one_graph(family):
    model = made(family)
    model.set_attn_implementation("ladder")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    packed = torch.cat([torch.arange(n) for n in (7, 1, 8)])[None].expand(2, -1)
    for positions in (None, packed):
        options = {"position_ids": positions, "use_cache": False}
        torch.testing.assert_close(compiled(TOKENS, **options).logits, model(TOKENS, **options).logits, rtol=1e-4, atol=1e-5)


def test_padding_does_not_compile():
    model = made("llama")
    model.set_attn_implementation("ladder")
    with pytest.raises(Exception, match=r"under torch.compile this door takes no attention_mask"):
        torch.compile(model, fullgraph=True, backend="eager")(TOKENS, attention_mask=PADDING["left"], use_cache=False)


# ---- what cannot be ----


def test_other_masks_are_refused():
    model = made("llama")
    model.set_attn_implementation("ladder")
    holes = torch.ones_like(TOKENS)
    holes[0, 4:7] = 0
    with pytest.raises(ValueError, match="sees keys that are no interval"):
        model(TOKENS, attention_mask=holes)
    with pytest.raises(ValueError, match="this attention mask was made elsewhere"):
        model(TOKENS, attention_mask=torch.zeros(2, 1, 16, 16))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"dropout": 0.1}, r"dropout=0\.1: attention has none"),
        ({"output_attentions": True}, "output_attentions: attention has nothing like it"),
        ({"position_bias": torch.zeros(1)}, "position_bias: attention has nothing like it"),
        ({"sliding_window": 4}, "a window of 4 without a mask"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_attention_has_no_words_for_is_refused(asked, says):
    q = torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match=says):
        run_layer(torch.nn.Module(), q, q, q, None, **asked)


@pytest.mark.parametrize("name", ["flash_ladder", "eager", "paged|ladder", "ladder_sdpa"])
def test_names_that_transformers_takes_for_others_are_refused(name):
    with pytest.raises(ValueError, match="means something else in transformers"):
        register(name)
