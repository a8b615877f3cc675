"""conf/model: what a user may choose of the model, with its defaults, its checks and the memory that it takes (docs/model.md)."""

from __future__ import annotations

from dataclasses import dataclass

from flash_ladder.errors import UserError, at_least, one_of
from flash_ladder.memory import must_fit


@dataclass
class ModelConfig:
    """conf/model: the shape of the GPT."""

    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 2
    d_model: int = 128
    d_ff: int | None = None  # None: 4 * d_model for GELU; SwiGLU takes two thirds of it, rounded up to 64
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-5
    position: str = "rotary"  # rotary | learned | alibi
    rope_theta: float = 10000.0
    max_seq_len: int = 1024  # rows of a learned position table; rotary positions have no such limit
    mlp: str = "swiglu"  # swiglu | gelu
    bias: bool = False
    qk_norm: bool = False  # RMSNorm of every head's queries and keys, before they are rotated (Qwen 3)
    softcap: float | None = None  # a score s becomes softcap * tanh(s / softcap) (Gemma 2)
    window_size: int | None = None  # positions that a query sees, its own and those before it (Mistral); None: all
    # With a window, every n-th block sees all positions: every 2nd in Gemma 2, every 6th in Gemma 3. None: no block does.
    full_every: int | None = None
    tie_embeddings: bool = True
    vocab_size: int | None = None  # None: the tokenizer's, rounded up to 64

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    def window_of(self, layer: int) -> int | None:
        """The window of block `layer`, counted from 0; None: it sees all positions."""
        return None if self.full_every is not None and (layer + 1) % self.full_every == 0 else self.window_size

    def attention_features(self) -> set[str]:
        """What the model asks of attention beside causality, in the words of kernels.asked.FEATURES."""
        used = {"window_size": self.window_size is not None, "softcap": self.softcap is not None}
        used["alibi_slopes"] = self.position == "alibi"
        return {name for name, is_used in used.items() if is_used}

    @property
    def hidden_dim(self) -> int:
        """Width of the MLP's hidden layer."""
        if self.d_ff is not None:
            return self.d_ff
        return 4 * self.d_model if self.mlp == "gelu" else -(-8 * self.d_model // 3 // 64) * 64

    def n_params(self, vocab_size: int) -> int:
        """The number of parameters of a model.gpt.GPT with that vocabulary, shared ones counted once."""
        width, qkv, hidden = self.d_model, (self.n_head + 2 * self.n_kv_head) * self.head_dim, self.hidden_dim
        up = 2 * hidden if self.mlp == "swiglu" else hidden
        norm = width * (2 if self.norm == "layernorm" and self.bias else 1)
        block = 2 * norm + width * (qkv + width + up + hidden) + (qkv + up + 2 * width if self.bias else 0)
        block += 2 * self.head_dim if self.qk_norm else 0
        tables = vocab_size * (1 if self.tie_embeddings else 2) + (self.max_seq_len if self.position == "learned" else 0)
        return self.n_layer * block + norm + width * tables

    def check_memory(self, n_bytes: int = 4, vocab_size: int = 257) -> None:
        """Raises UserError where this machine cannot hold the model, with `n_bytes` for every parameter (4: the weights alone).

        vocab_size: the fewest tokens there will be, where the configuration leaves that to the tokenizer.
        """
        vocab_size = self.vocab_size or vocab_size
        n = self.n_params(vocab_size)
        what = (
            f"a model of {n:,} parameters (model.d_model={self.d_model}, model.n_layer={self.n_layer}, vocabulary {vocab_size:,})"
        )
        must_fit(what if n_bytes == 4 else f"training {what}", n * n_bytes, "a smaller one would fit")

    def validate(self) -> None:
        at_least(1, model__n_layer=self.n_layer, model__n_head=self.n_head, model__n_kv_head=self.n_kv_head)
        at_least(1, model__d_model=self.d_model, model__d_ff=self.d_ff, model__max_seq_len=self.max_seq_len)
        at_least(1, model__window_size=self.window_size, model__full_every=self.full_every)
        at_least(2, model__vocab_size=self.vocab_size)
        at_least(0, model__norm_eps=self.norm_eps)
        at_least(1, model__rope_theta=self.rope_theta)
        one_of("model.norm", self.norm, ("rmsnorm", "layernorm"))
        one_of("model.position", self.position, ("rotary", "learned", "alibi"))
        one_of("model.mlp", self.mlp, ("swiglu", "gelu"))
        if self.d_model % self.n_head:
            raise UserError(
                f"model.d_model={self.d_model} is not divisible by model.n_head={self.n_head}: every head has d_model / n_head "
                f"dimensions; d_model={self.n_head * max(1, round(self.d_model / self.n_head))} would work"
            )
        check_groups(self.n_head, self.n_kv_head, "model.")
        if self.softcap is not None and not self.softcap > 0:
            raise UserError(f"model.softcap={self.softcap} must be positive; null leaves the scores as they are")
        if self.full_every is not None and self.window_size is None:
            raise UserError(
                f"model.full_every={self.full_every} says which blocks have no window; give model.window_size=N as well"
            )
        if self.position == "rotary" and self.head_dim % 2:
            raise UserError(f"model.position=rotary rotates pairs: head_dim = d_model / n_head = {self.head_dim} must be even")


def check_groups(n_head: int, n_kv_head: int, group: str = "") -> None:
    """Raises UserError where the query heads are no equal groups, one for each key/value head; `group` comes before the keys."""
    if n_head % n_kv_head:
        raise UserError(
            f"{group}n_head={n_head} is not divisible by {group}n_kv_head={n_kv_head}: each key/value head serves an equal group "
            f"of query heads; n_kv_head can be {', '.join(map(str, divisors(n_head)))}"
        )


def divisors(n: int) -> list[int]:
    """The divisors of `n` up to 1000, for a line that says what would work."""
    return [d for d in range(1, min(n, 1000) + 1) if n % d == 0]
