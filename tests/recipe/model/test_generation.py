"""Sampling: the same as forward passes without a cache, the right distribution, and text that is always valid UTF-8."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import flash_ladder.model.generation
from flash_ladder.data.tokenizer import byte_tokenizer, train_bpe
from flash_ladder.errors import UserError
from flash_ladder.model.generation import generate, stream
from flash_ladder.model.gpt import GPT
from flash_ladder.model_schema import ModelConfig

TOKENIZER = byte_tokenizer()
VOCAB = 320  # the tokenizer's 257, padded
BAD = "\ufffd"


def small(**parts) -> GPT:
    torch.manual_seed(0)
    net = GPT(ModelConfig(**{"n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 32, "vocab_size": VOCAB, **parts}))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3)
    return net


class Scripted:
    """Stands in for a model: after any prompt its logits at step i are `script[i]`, [VOCAB]; the last line repeats."""

    def __init__(self, script: list[torch.Tensor]) -> None:
        self.cfg = ModelConfig(n_layer=1, n_head=1, n_kv_head=1, d_model=2, vocab_size=VOCAB)
        self.embedding = SimpleNamespace(weight=torch.zeros(1))
        self.script, self.calls = script, 0

    def forward(self, tokens, *, cache):
        logits = self.script[min(self.calls, len(self.script) - 1)]
        self.calls += 1
        return logits.expand(1, tokens.shape[1], -1)


def saying(ids: list[int]) -> Scripted:
    """A model that is sure of `ids` and then of the document's end."""
    return Scripted([torch.full((VOCAB,), -1e4).index_fill(0, torch.tensor(i), 0.0) for i in (*ids, TOKENIZER.eos_id)])


def ids_of(raw: bytes) -> list[int]:
    """The tokens of bytes that need not be text: each byte is found in some text that has it."""
    token = {}
    for text in (chr(c) for c in (*range(0x100), 0x20AC, 0x1F600, 0x4E2D)):
        token |= dict(zip(text.encode(), TOKENIZER.encode(text), strict=True))
    return [token[byte] for byte in raw]


# ---- which tokens ----


@pytest.mark.parametrize("prefill", [3, 512])
@pytest.mark.parametrize(
    "parts", [{}, {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True}], ids=["llama", "gpt2"]
)
def test_greedy_decoding_is_the_argmax_of_full_forward_passes(parts, prefill, monkeypatch):
    monkeypatch.setattr(flash_ladder.model.generation, "PREFILL", prefill)
    net, prompt = small(**parts), "def main"
    ids = TOKENIZER.encode(prompt)
    for _ in range(30):
        token = net(torch.tensor([ids]))[0, -1, : TOKENIZER.vocab_size].argmax().item()
        if token == TOKENIZER.eos_id:
            break
        ids.append(token)
    assert len(ids) > 15
    text = generate(net, TOKENIZER, prompt, max_new_tokens=30, temperature=0)
    assert text == TOKENIZER.decode(ids)
    assert text == generate(net, TOKENIZER, prompt, max_new_tokens=30, temperature=0.5, top_k=1, seed=3)


def test_a_space_that_ends_the_prompt_is_the_first_tokens():
    """The model reads "def" and must write a token that begins with the space, though it would rather write another."""
    words = train_bpe(["def one two three four " * 50], 300)
    with_space = words.encode("def one")[-1]
    assert words.decode([with_space]) == " one"
    read = []

    class Eager(Scripted):
        def forward(self, tokens, *, cache):
            read.append(tokens[0].tolist())
            return super().forward(tokens, cache=cache)

    likes = torch.full((VOCAB,), -1e4)
    likes[words.encode("x")[0]], likes[with_space] = 5.0, 1.0
    assert generate(Eager([likes, saying([]).script[0]]), words, "def ", max_new_tokens=1, temperature=0) == "def one"
    assert read == [words.encode("def")]
    assert generate(Eager([likes]), words, "def", max_new_tokens=1, temperature=0) == "defx"
    assert "".join(stream(small(), TOKENIZER, "a  ", max_new_tokens=5)).startswith("a  ")


def test_the_seed_decides_the_text():
    net = small()
    first, again, other = (generate(net, TOKENIZER, "def ", max_new_tokens=20, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert first.startswith("def ")


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (2.0, None), (0.5, 3), (1.0, 2)])
def test_samples_follow_the_distribution_asked_for(temperature, top_k):
    letters, p = "abcd", torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = torch.full((VOCAB,), -1e4)
    logits[TOKENIZER.encode(letters)] = p.log()
    n = 4000
    text = generate(Scripted([logits]), TOKENIZER, "", max_new_tokens=n, temperature=temperature, top_k=top_k, seed=1)
    expected = p ** (1 / temperature)
    expected[top_k or 4 :] = 0
    expected /= expected.sum()
    counts = Counter(text)
    for letter, share in zip(letters, expected.tolist(), strict=True):
        assert abs(counts[letter] / n - share) < 4 * math.sqrt(share * (1 - share) / n) + 1e-9, letter


def test_the_document_ends_where_the_model_ends_it():
    net = saying(TOKENIZER.encode("pass\n"))
    assert generate(net, TOKENIZER, "x: ", max_new_tokens=100) == "x: pass\n"
    assert generate(saying(TOKENIZER.encode("pass\n")), TOKENIZER, "x: ", max_new_tokens=3) == "x: pas"
    assert generate(saying(TOKENIZER.encode("pass\n")), TOKENIZER, "x: ", max_new_tokens=0) == "x: "


def test_an_empty_prompt_begins_a_document():
    net, first = small(), []
    net.embedding.register_forward_pre_hook(lambda module, inputs: first.append(inputs[0].tolist()))
    generate(net, TOKENIZER, "", max_new_tokens=1)
    assert first == [[[TOKENIZER.eos_id]]]


def test_the_padding_of_the_vocabulary_is_never_sampled():
    logits = torch.zeros(VOCAB)
    logits[TOKENIZER.encode("a")] = 50.0
    logits[TOKENIZER.vocab_size :] = 100.0
    for temperature in (0, 1.0):
        assert generate(Scripted([logits]), TOKENIZER, "", max_new_tokens=5, temperature=temperature, top_k=None) == "aaaaa"


# ---- as text ----


@pytest.mark.parametrize(
    "raw, pieces",
    [
        ("aé€😀中z".encode(), ["a", "é", "€", "😀", "中", "z"]),
        (b"a\xc3", ["a", BAD]),  # ends inside a character
        (b"\xc3a", [BAD + "a"]),  # the byte that follows shows that the first began no character
        (b"\xe2\x82\xe2\x82\xac!", [BAD, "€", "!"]),
        (b"\xf0\x9f\x98", [BAD]),
    ],
)
def test_a_character_comes_when_it_is_complete(raw, pieces):
    text = list(stream(saying(ids_of(raw)), TOKENIZER, "> ", max_new_tokens=50))
    assert text == ["> ", *pieces]
    assert "".join(text) == "> " + TOKENIZER.decode(ids_of(raw))


def test_text_comes_as_the_model_writes_it():
    net = saying(TOKENIZER.encode("abc"))
    text = stream(net, TOKENIZER, "> ")
    seen = [(next(text), net.calls) for _ in range(4)]
    assert seen == [("> ", 0), ("a", 1), ("b", 2), ("c", 3)]


# ---- its surroundings ----


def test_a_learned_position_table_limits_the_text():
    net = small(position="learned", max_seq_len=10)
    assert generate(net, TOKENIZER, "12345678", max_new_tokens=2, temperature=0).startswith("12345678")
    with pytest.raises(
        UserError, match="8 tokens and max_new_tokens=3 pass the model's 10 learned positions; max_new_tokens=2 would fit"
    ):
        generate(net, TOKENIZER, "12345678", max_new_tokens=3)
    with pytest.raises(UserError, match=r"12 tokens .* a shorter prompt would fit"):
        generate(net, TOKENIZER, "123456789012", max_new_tokens=3)


@pytest.mark.parametrize("bad", [{"max_new_tokens": -1}, {"temperature": -0.1}, {"top_k": 0}], ids=str)
def test_arguments_out_of_range_are_refused(bad):
    with pytest.raises(UserError, match=rf"{next(iter(bad))}=\S+ must be at least"):
        stream(small(), TOKENIZER, "", **bad)


def test_a_compiled_model_is_not_compiled_again_for_every_length():
    net, graphs = small(), []
    expected = generate(net, TOKENIZER, "def ", max_new_tokens=5)
    net.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    assert generate(net, TOKENIZER, "def ", max_new_tokens=5) == expected
    assert not graphs


def test_the_cache_has_the_dtype_that_attention_runs_in(monkeypatch):
    dtypes, init = [], flash_ladder.model.generation.KVCache.__init__

    def noted(cache, *arguments, dtype, **more):
        dtypes.append(dtype)
        init(cache, *arguments, dtype=dtype, **more)

    monkeypatch.setattr(flash_ladder.model.generation.KVCache, "__init__", noted)
    generate(small(), TOKENIZER, "def ", max_new_tokens=5)
    with torch.autocast("cpu", torch.bfloat16):
        generate(small(), TOKENIZER, "def ", max_new_tokens=5)
    assert dtypes == [torch.float32, torch.bfloat16]


def test_no_gradients_are_kept_and_the_callers_mode_is_left_alone():
    net, modes = small(), []
    net.embedding.register_forward_pre_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    for _ in stream(net, TOKENIZER, "def ", max_new_tokens=3, temperature=0):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert modes == [True] * 3


def test_no_temperature_is_too_small():
    """The likeliest token is left, and nothing overflows."""
    coldest = generate(small(), TOKENIZER, "def ", max_new_tokens=8, temperature=0)
    for temperature in (1e-300, 5e-324, 1e-40):
        assert generate(small(), TOKENIZER, "def ", max_new_tokens=8, temperature=temperature) == coldest


def test_what_the_keys_and_values_would_take_is_said_before_the_prompt(monkeypatch):
    monkeypatch.setattr("flash_ladder.memory.machine_memory", lambda: 2**34)
    with pytest.raises(UserError, match=r"max_new_tokens=100000000000000: the keys and values would take .* TiB"):
        stream(small(), TOKENIZER, "def ", max_new_tokens=10**14)
