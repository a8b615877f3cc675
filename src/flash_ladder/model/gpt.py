"""The model: one GPT, a stack of pre-norm blocks whose parts `ModelConfig` picks.

Shapes in comments and docstrings are written with these letters:
    B  sequences in a batch       H  query heads                          L  blocks
    S  positions of this call     K  key/value heads, each serving H / K  V  vocabulary
    E  d_model                    D  head_dim, E / H                      F  hidden width of the MLP

Under bf16 autocast the residual stream, the norms and the loss stay in float32; matrix products, attention and the logits are bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flash_ladder.errors import UserError
from flash_ladder.kernels import attention
from flash_ladder.kernels.operators import attention_forward
from flash_ladder.model.loss import mean_loss, mean_loss_in_pieces
from flash_ladder.model.sequence import SharedSequence
from flash_ladder.model_schema import ModelConfig

# What activation_checkpointing="keep_attention" keeps the results of: the flash rungs' operator, and those of PyTorch's attention.
ATTENTION_OPERATORS = (
    attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)

Attend = Callable[..., Tensor]  # kernels.attention, with the arguments that all blocks have in common


class GPT(nn.Module):
    """A decoder-only transformer with GPT-2's initialisation.

    `backend` names the attention backend that every block calls. `activation_checkpointing` makes a block keep only its input for
    the backward pass, or as "keep_attention" also what attention gave, which then runs once. `loss_rows` is how many positions'
    logits the loss holds at once (None: all). `sequence` is set where several processes hold a sequence together: a call without
    a cache is then given this process's part of it. All four may be set at any time. `torch.compile(net, fullgraph=True)` compiles
    it, loss included.
    """

    def __init__(self, cfg: ModelConfig, *, backend: str = "eager") -> None:
        super().__init__()
        if cfg.vocab_size is None:
            raise ValueError("cfg.vocab_size is None; the tokenizer's size, rounded up, must be filled in first")
        self.cfg = cfg
        self.backend = backend
        self.activation_checkpointing: bool | str = False
        self.loss_rows: int | None = None
        self.sequence: SharedSequence | None = None
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.position = nn.Embedding(cfg.max_seq_len, cfg.d_model) if cfg.position == "learned" else None
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.norm = _norm(cfg)
        self.head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's initialisation: N(0, 0.02²); what adds to the residual stream is scaled by 1 / sqrt(2 L); biases 0, norms 1."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                adds_to_residual = name.endswith(("attention.out", "mlp.down"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.cfg.n_layer) if adds_to_residual else 0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
                module.reset_parameters()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Returns the logits [B, S, V], or with `targets` the mean cross-entropy in nats as a float32 scalar.

        tokens: int64 [B, S]. targets: int64 [B, S], the token that follows each position; -100 is left out of the mean, which is
        nan when every target is -100. document_ids: int32 [B, S], non-decreasing in a row; attention stays inside a document. With
        `sequence` set they are those of the whole sequence, and the loss is the mean over this process's part.
        cache: keys and values of the positions before `tokens`; the call appends those of `tokens`. For use without gradients.
        Raises UserError where the positions pass a learned position table or the cache's end.
        """
        shared = self.sequence if cache is None else None
        start = 0 if cache is None else cache.length
        if shared is not None:
            start = shared.rank * tokens.shape[1]
        end = start + tokens.shape[1]
        if cache is not None and end > cache.max_len:
            raise UserError(f"{end} positions do not fit a KV cache of {cache.max_len}; a longer one would work")

        x = self.embedding(tokens)  # [B, S, E]
        angles = slopes = None
        if self.cfg.position == "rotary":
            angles = rotary_angles(tokens, start, self.cfg.head_dim, self.cfg.rope_theta)
        elif self.position is None:
            slopes = alibi_slopes(self.cfg.n_head, tokens.device)
        elif end > self.cfg.max_seq_len:
            raise UserError(
                f"{end} positions pass the learned position table of model.max_seq_len={self.cfg.max_seq_len}; "
                f"a shorter text fits, and a model with model.position=rotary or alibi has no such limit"
            )
        else:
            x = x + self.position.weight[start:end]

        attend = partial(
            attention if shared is None else shared.attention,
            is_causal=True, alibi_slopes=slopes, document_ids=document_ids, backend=self.backend,
        )  # fmt: skip
        # Nothing random happens in a block, so there is no generator state to keep and restore.
        recomputed: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if self.activation_checkpointing == "keep_attention":
            recomputed["context_fn"] = partial(create_selective_checkpoint_contexts, list(ATTENTION_OPERATORS))
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(block, x, angles, attend, **recomputed)
            else:
                x = block(x, angles, attend, cache)
        if cache is not None:
            cache.length = end

        return self.predict(x, targets)

    def predict(self, x: Tensor, targets: Tensor | None) -> Tensor:
        """The end of `forward`, after the last block: x [B, S, E] to the logits [B, S, V], or with `targets` to the loss."""
        x, words = self.norm(x), self.embedding.weight if self.head is None else self.head.weight
        if targets is not None and self.loss_rows is not None:
            return mean_loss_in_pieces(x, words, targets, self.loss_rows)
        logits = F.linear(x, words)
        return logits if targets is None else mean_loss(logits, targets)

    @property
    def n_params(self) -> int:
        """The number of parameters, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def n_params_matmul(self) -> int:
        """The N of 6 N FLOPs per token: all parameters but tables that are only looked up. A tied embedding counts, as the head."""
        looked_up = [self.position] if self.head is None else [self.position, self.embedding]
        return self.n_params - sum(table.weight.numel() for table in looked_up if table is not None)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = _norm(cfg)
        self.attention = Attention(cfg, layer)
        self.mlp_norm = _norm(cfg)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, angles: Tensor | None, attend: Attend, cache: KVCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, attend, cache)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal self-attention, grouped where K < H. One product gives queries, keys and values, which are views of it."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer  # index of its keys and values in a cache
        self.head_dim = cfg.head_dim
        self.heads = (cfg.n_head, cfg.n_kv_head, cfg.n_kv_head)
        self.window_size = cfg.window_of(layer)
        self.softcap = cfg.softcap
        self.q_norm = nn.RMSNorm(cfg.head_dim, eps=cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = nn.RMSNorm(cfg.head_dim, eps=cfg.norm_eps) if cfg.qk_norm else None
        self.qkv = nn.Linear(cfg.d_model, sum(self.heads) * cfg.head_dim, bias=cfg.bias)
        self.out = nn.Linear(cfg.d_model, cfg.d_model, bias=cfg.bias)

    def forward(self, x: Tensor, angles: Tensor | None, attend: Attend, cache: KVCache | None) -> Tensor:
        H, K, _ = self.heads
        qkv = self.qkv(x).unflatten(-1, (H + 2 * K, self.head_dim))  # [B, S, H + 2K, D]
        qk, v = qkv.split((H + K, K), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((H, K), dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2).to(qkv.dtype)
        if angles is not None:
            qk = rotate(qk, angles)
        q, k = qk.transpose(1, 2).split((H, K), dim=1)  # [B, H, S, D], [B, K, S, D]
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = attend(q, k, v, window_size=self.window_size, softcap=self.softcap)  # [B, H, S, D]
        return self.out(y.transpose(1, 2).flatten(2))  # no copy where the backend wrote [B, S, H, D]


class MLP(nn.Module):
    """GELU (tanh approximation, as GPT-2) or SwiGLU (Shazeer, 2020: https://arxiv.org/abs/2002.05202)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.swiglu = cfg.mlp == "swiglu"
        self.up = nn.Linear(cfg.d_model, (2 if self.swiglu else 1) * cfg.hidden_dim, bias=cfg.bias)  # SwiGLU: gate over value
        self.down = nn.Linear(cfg.hidden_dim, cfg.d_model, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)  # [B, S, F], or [B, S, 2F]
        if self.swiglu:
            gate, value = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(x, approximate="tanh"))


def _norm(cfg: ModelConfig) -> nn.Module:
    if cfg.norm == "rmsnorm":
        return nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
    return nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps, bias=cfg.bias)


# ---- rotary positions (Su et al., 2021: https://arxiv.org/abs/2104.09864) ----


# Computed from the positions at each call: no buffer that is outgrown, rounded by `.to(bfloat16)` or lost on the meta device.
# As a torch operator it is computed once; otherwise torch.compile would fuse the cosines into every layer's kernel.
@torch.library.custom_op("flash_ladder::rotary_angles", mutates_args=())
def rotary_angles(tokens: Tensor, start: int, head_dim: int, theta: float) -> Tensor:
    """Cosine and sine of position · theta^(−2i / D), float32 [2, S, 1, D / 2]; tokens [B, S] lie at positions start + 0 … S − 1.

    The angles are float64: of a million positions float32 would be off by 0.03 rad.
    """
    i = torch.arange(0, head_dim, 2, device=tokens.device, dtype=torch.float64)
    positions = torch.arange(start, start + tokens.shape[1], device=tokens.device, dtype=torch.float64)
    angle = positions[:, None, None] * (1.0 / theta ** (i / head_dim))
    return torch.stack((angle.cos().float(), angle.sin().float()))


@rotary_angles.register_fake
def _(tokens: Tensor, start: int, head_dim: int, theta: float) -> Tensor:
    return tokens.new_empty((2, tokens.shape[1], 1, head_dim // 2), dtype=torch.float32)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates dimension i of each head of x [B, S, heads, D] with dimension i + D / 2, as Llama does; new, in x's dtype."""
    cos, sin = angles.unbind()
    first, second = x.chunk(2, dim=-1)
    # The products are float32 by type promotion, whatever x is.
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


# ---- positions as a distance (ALiBi; Press et al., 2022: https://arxiv.org/abs/2108.12409) ----


def alibi_slopes(n_head: int, device: torch.device) -> Tensor:
    """What a head subtracts from a score per position of distance, float32 [H]: 2^(−8 i / n) for i = 1 … n, n a power of two.

    Another number of heads takes those of the power of two below it, then every other one of the power above, as the paper's code.
    """
    n = 2 ** int(math.log2(n_head))
    exponents = [8 * i / n for i in range(1, n + 1)] + [4 * i / n for i in range(1, 2 * (n_head - n), 2)]
    return torch.tensor([2.0**-x for x in exponents], device=device)


class KVCache:
    """Keys and values of the positions a model has seen, for decoding: `length` of `max_len`, kept as [L, B, K, max_len, D].

    `dtype` is the one that attention runs in: autocast's where autocast is on, else the weights'.
    """

    def __init__(
        self, cfg: ModelConfig, *, batch_size: int = 1, max_len: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.length = 0
        self.max_len = max_len
        shape = (cfg.n_layer, batch_size, cfg.n_kv_head, max_len, cfg.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)

    @staticmethod
    def bytes_of(cfg: ModelConfig, *, max_len: int, dtype: torch.dtype) -> int:
        """Bytes that a cache for one sequence takes."""
        return 2 * cfg.n_layer * cfg.n_kv_head * max_len * cfg.head_dim * dtype.itemsize

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v [B, K, S, D] of `layer` after the first `length` positions and returns views of all [B, K, length + S, D].

        The caller moves `length` when every layer has written.
        """
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
