"""Models of transformers: what loads, which attention a name means, and a line for what cannot be."""

import json

import pytest
import torch
import transformers as hf

from flash_ladder.certify import causal_lm
from flash_ladder.certify.causal_lm import Implementation, implementation, load
from flash_ladder.errors import UserError
from tests.helpers import tiny_hf

CPU = torch.device("cpu")
TOKENS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_hf.write(tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize(("dtype", "loaded"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_folder_loads(folder, dtype, loaded):
    lm = load(str(folder), dtype, CPU)
    assert lm.dtype == loaded and lm.exact_model.dtype == torch.float64 and lm.longest == 128
    assert lm.encode("a\nbé") == lm.tokenizer.convert_tokens_to_ids(["a", "Ċ", "b", "Ã", "©"])
    for exact, weight in zip(lm.exact_model.parameters(), lm.model.parameters(), strict=True):
        assert torch.equal(exact, weight.double())  # of the very weights, rounded as they are
    assert lm.exact_logits(TOKENS).dtype == torch.float64


# ---- implementations ----


def test_a_name_means_ours_or_transformers():
    net = tiny_hf.model("llama")
    auto, rung, theirs = (implementation("a", name, net) for name in ("auto", "flash_v2", "sdpa"))
    assert (auto.label, auto.key) == ("auto", "ladder") and "CPU" in auto.reason
    assert (rung.label, rung.key) == ("flash_v2", "ladder_v2")
    assert theirs == Implementation("sdpa", "sdpa")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("egaer", r"a=egaer is not a choice \(auto, flash_v1, flash_v2, flash_v3, eager, .*sdpa.*\); did you mean eager\?"),
        ("flash_v3", "a=flash_v3: attention backend flash_v3 cannot run here: "),
    ],
)
def test_a_name_that_cannot_be(name, says):
    with pytest.raises(UserError, match=says):
        implementation("a", name, tiny_hf.model("llama"))


def test_a_model_without_attention_is_refused():
    net = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(UserError, match="a=auto: a MambaForCausalLM has no attention heads"):
        implementation("a", "auto", net)


def test_a_model_that_float64_stops_is_said(monkeypatch):
    lm = tiny_hf.causal_lm("llama")
    monkeypatch.setattr(lm.exact_model, "forward", lambda *tokens, **options: torch.ones(2) @ torch.ones(2, dtype=torch.float64))
    with pytest.raises(UserError, match="model=llama cannot run in float64: "):
        lm.exact_logits(TOKENS)


def test_a_package_that_is_missing_is_said():
    lm = tiny_hf.causal_lm("llama")
    with pytest.raises(UserError, match="flash_attention_4 attention cannot run this model here: ") as raised:
        lm.logits(implementation("a", "flash_attention_4", lm.model), TOKENS)
    assert "\n" not in str(raised.value)


def test_what_the_door_refuses_is_said():
    lm = tiny_hf.causal_lm("llama")
    door = implementation("a", "auto", lm.model)
    lm.model.forward = lambda tokens, **options: hf.LlamaForCausalLM.forward(lm.model, tokens, output_attentions=True, **options)
    with pytest.raises(UserError, match=r"auto attention cannot run this model here: output_attentions: attention has nothing"):
        lm.logits(door, TOKENS)


def test_a_model_that_keeps_its_own_attention_is_refused(monkeypatch):
    """transformers warns and goes on; two names would then run one attention, and be certified."""
    lm = tiny_hf.causal_lm("llama")
    monkeypatch.setattr(type(lm.model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(UserError, match="sdpa attention cannot run this model here: transformers runs eager in its place"):
        lm.logits(Implementation("sdpa", "sdpa"), TOKENS)


def test_memory_that_does_not_suffice_is_said(monkeypatch):
    lm = tiny_hf.causal_lm("llama")

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(lm.model), "forward", full)
    with pytest.raises(UserError, match="eager attention does not fit in the GPU's memory with 12 tokens"):
        lm.logits(Implementation("eager", "eager"), TOKENS)
    with pytest.raises(UserError, match="the float64 forward does not fit in the GPU's memory with 12 tokens"):
        lm.exact_logits(TOKENS)


# ---- folders ----


def without_a_weight(folder):
    tiny_hf.write(folder)
    net = tiny_hf.model("llama")
    net.save_pretrained(folder, state_dict={k: w for k, w in net.state_dict().items() if "layers.1.mlp.up" not in k})
    return "lacks weights of a LlamaForCausalLM .model.layers.1.mlp.up_proj.weight., which would be random numbers"


def of_our_own(folder):
    (folder / "config.json").write_text(json.dumps({"model": {"n_layer": 2}}))
    return "cannot be loaded as a causal language model: "


def without_a_tokenizer(folder):
    tiny_hf.model("llama").save_pretrained(folder)
    for file in folder.glob("token*"):
        file.unlink()
    return "cannot be loaded as a causal language model: "


def damaged(folder):
    tiny_hf.write(folder)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    return "cannot be loaded as a causal language model: "


def empty(folder):
    return "has no config.json; name a folder that save_pretrained wrote"


@pytest.mark.parametrize(
    "make", [without_a_weight, of_our_own, without_a_tokenizer, damaged, empty], ids=lambda make: make.__name__
)
def test_a_folder_that_is_no_model(tmp_path, monkeypatch, make):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "model"
    folder.mkdir()
    says = make(folder)
    with pytest.raises(UserError, match=says) as raised:
        load(str(folder), "auto", CPU)
    assert "\n" not in str(raised.value) and f"model={folder}" in str(raised.value)


@pytest.mark.parametrize("name", ["../none", "a/b/c", "/none", "none.d/", "~"])
def test_a_path_that_is_not_there_is_no_name_on_the_hub(name):
    with pytest.raises(UserError, match=r"does not exist; name a folder"):
        load(name, "auto", CPU)


def test_tokens_beyond_the_model(folder):
    lm = load(str(folder), "auto", CPU)
    lm.model.resize_token_embeddings(100)
    with pytest.raises(UserError, match=r"its tokenizer gives token .* and the model has 100; they do not belong together"):
        lm.encode("zebra é")


def test_transformers_missing_is_a_line_with_what_to_install(monkeypatch):
    monkeypatch.setattr(causal_lm, "installed", lambda name: None)
    with pytest.raises(UserError, match=r"which is not installed: pip install 'transformers>=5\.24,<6'"):
        load("model", "auto", CPU)


def test_transformers_too_old_for_the_door_is_a_line_with_what_to_install(monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda batch_size: None)
    with pytest.raises(
        UserError, match=r"a=auto: this door needs transformers 5\.24 or later: .*; pip install 'transformers>=5\.24,<6'"
    ):
        implementation("a", "auto", tiny_hf.model("llama"))
