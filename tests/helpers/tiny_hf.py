"""Small random models of transformers, with weights so large that every part of them matters, and attention that is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flash_ladder.certify.causal_lm import CausalLM, in_float64

VOCAB = 256  # the bytes
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
COMMON = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**LLAMA, **COMMON, num_hidden_layers=2, max_position_embeddings=128, attention_dropout=0.0)
    ),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **LLAMA,
            **COMMON,
            num_hidden_layers=2,
            max_position_embeddings=128,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=16,
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **COMMON)),
}


def model(family: str, std: float = 0.2) -> hf.PreTrainedModel:
    """A model in float32, with random weights of this size."""
    torch.manual_seed(1)
    net = MODELS[family]().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, std)
    return net


def causal_lm(family: str, dtype: torch.dtype = torch.float32, std: float = 0.2) -> CausalLM:
    """The model as `causal_lm.load` makes it, without a tokenizer."""
    net = model(family, std).to(dtype)
    net.set_attn_implementation("eager")
    return CausalLM(family, net, in_float64(copy.deepcopy(net)), None)


def write(folder: Path, family: str = "llama") -> Path:
    """Writes a model and a tokenizer of bytes as transformers does."""
    net = model(family)
    net.save_pretrained(folder)
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    hf.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return folder


def attend(sees: Callable, factor: float = 1.0, fails: str | None = None) -> Callable:
    """An attention function of transformers in which query i sees the keys j with sees(i, j), and the scale is times `factor`."""

    def layer(module: torch.nn.Module, query, key, value, attention_mask, scaling=None, **others) -> tuple:
        if fails:
            raise ValueError(fails)
        group, seq_q, seq_k = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        i, j = torch.arange(seq_k - seq_q, seq_k)[:, None], torch.arange(seq_k)
        scores = query @ key.transpose(-1, -2) * (factor * (query.shape[-1] ** -0.5 if scaling is None else scaling))
        weights = torch.softmax(scores.masked_fill(~sees(i, j), -torch.inf), -1, dtype=torch.float32).to(value.dtype)
        return (weights @ value).transpose(1, 2), None

    return layer


WRONG = {
    "sees_one_later_key": attend(lambda i, j: j <= i + 1),
    "misses_its_own_key": attend(lambda i, j: (j < i) | (i + j == 0)),
    "scale_off_by_1_percent": attend(lambda i, j: j <= i, factor=1.01),
    "drops_a_tile": attend(lambda i, j: (j <= i) & ~((j // 16 == 1) & (i >= 32))),
    "drops_the_last_tile": attend(lambda i, j: (j <= i) & ~((j // 8 == 2) & (i >= 56))),
}
for name, layer in WRONG.items():
    hf.AttentionInterface.register(name, layer)
