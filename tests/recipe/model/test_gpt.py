"""The model against transformers' GPT-2 and Llama, and what it promises about causality, documents, caches and copies."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

import flash_ladder.model.gpt
from flash_ladder.errors import UserError
from flash_ladder.model.gpt import GPT, KVCache, alibi_slopes, rotary_angles, rotate
from flash_ladder.model_schema import ModelConfig

SMALL = {"n_layer": 2, "n_head": 4, "n_kv_head": 4, "d_model": 32, "vocab_size": 80, "max_seq_len": 24}
GPT2_PARTS = {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True}
LLAMA_PARTS = {"n_kv_head": 2}  # the defaults are RMSNorm, rotary, SwiGLU and no bias
# Everything else that a block may have: in every second block a window of five positions, ALiBi without rotary positions.
WINDOW_PARTS = {"n_kv_head": 2, "window_size": 5, "full_every": 2, "softcap": 2.0, "qk_norm": True}
ALIBI_PARTS = {"position": "alibi", "window_size": 9}
ALL_SHAPES = pytest.mark.parametrize(
    "parts", [GPT2_PARTS, LLAMA_PARTS, WINDOW_PARTS, ALIBI_PARTS], ids=["gpt2", "llama", "windows", "alibi"]
)
SHAPES = pytest.mark.parametrize("parts", [GPT2_PARTS, LLAMA_PARTS], ids=["gpt2", "llama"])


def small(parts: dict, seed: int = 0, **more) -> GPT:
    """A small model whose weights are large enough that every part of it matters."""
    torch.manual_seed(seed)
    net = GPT(ModelConfig(**{**SMALL, **parts, **more}))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.2)
    return net


def some_tokens(batch: int = 2, seq_len: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randint(SMALL["vocab_size"], (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def gradients(net: Callable, tokens: torch.Tensor, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(net(tokens[:, :-1], tokens[:, 1:]), parameters))


# ---- against independent implementations ----


def from_gpt2(theirs: dict, n_layer: int) -> dict:
    """transformers' GPT-2 tensors under our names; its Conv1D stores matrices transposed."""
    ours = {"embedding.weight": theirs["transformer.wte.weight"], "position.weight": theirs["transformer.wpe.weight"]}
    modules = {"attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj"}
    modules |= {"mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    for i in range(n_layer):
        for mine, other in modules.items():
            ours[f"blocks.{i}.{mine}.weight"] = theirs[f"transformer.h.{i}.{other}.weight"].t()
            ours[f"blocks.{i}.{mine}.bias"] = theirs[f"transformer.h.{i}.{other}.bias"]
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = theirs[f"transformer.ln_f.{kind}"]
    if "lm_head.weight" in theirs:
        ours["head.weight"] = theirs["lm_head.weight"]
    return ours


def from_llama(theirs: dict, n_layer: int) -> dict:
    """transformers' Llama tensors under our names; ours stacks q, k, v and gate, up."""
    ours = {"embedding.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"]}
    modules = {
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.o_proj",),
        "attention.q_norm": ("self_attn.q_norm",),
        "attention.k_norm": ("self_attn.k_norm",),
    }
    modules |= {"mlp.up": ("mlp.gate_proj", "mlp.up_proj"), "mlp.down": ("mlp.down_proj",)}
    modules |= {"attention_norm": ("input_layernorm",), "mlp_norm": ("post_attention_layernorm",)}
    for i in range(n_layer):
        for mine, others in modules.items():
            for kind in ("weight", "bias"):
                if f"model.layers.{i}.{others[0]}.{kind}" in theirs:
                    ours[f"blocks.{i}.{mine}.{kind}"] = torch.cat([theirs[f"model.layers.{i}.{o}.{kind}"] for o in others])
    if "lm_head.weight" in theirs:
        ours["head.weight"] = theirs["lm_head.weight"]
    return ours


def check_against(theirs: torch.nn.Module, net: GPT, rename: Callable[[dict, int], dict], seq_len: int) -> None:
    """Logits, loss and every parameter's gradient equal to 1e-5, in float32 and on every backend made of torch operations."""
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.1)
    net.load_state_dict(rename(dict(theirs.named_parameters()), net.cfg.n_layer))
    tokens = torch.randint(net.cfg.vocab_size, (3, seq_len + 1))
    expected = theirs(tokens, labels=tokens)  # shifts the labels itself
    expected.loss.backward()
    expected_grads = rename({name: p.grad for name, p in theirs.named_parameters()}, net.cfg.n_layer)
    for net.backend in ("eager", "sdpa"):
        torch.testing.assert_close(net(tokens), expected.logits, rtol=1e-5, atol=1e-5)
        loss = net(tokens[:, :-1], tokens[:, 1:])
        torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
        net.zero_grad()
        loss.backward()
        torch.testing.assert_close({n: p.grad for n, p in net.named_parameters()}, expected_grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_layer, n_head, head_dim, d_ff, tied, seq_len", [(2, 4, 16, None, True, 31), (3, 3, 10, 50, False, 8)])
def test_gpt2_shape_is_transformers_gpt2(n_layer, n_head, head_dim, d_ff, tied, seq_len):
    torch.manual_seed(n_layer)
    width = {"n_layer": n_layer, "n_head": n_head, "vocab_size": 70, "tie_embeddings": tied}
    d_model = n_head * head_dim
    cfg = ModelConfig(**width, **GPT2_PARTS, n_kv_head=n_head, d_model=d_model, d_ff=d_ff, max_seq_len=seq_len + 1)
    dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    shape = {"n_embd": d_model, "n_inner": d_ff, "n_positions": seq_len + 1, "layer_norm_epsilon": cfg.norm_eps}
    width["tie_word_embeddings"] = width.pop("tie_embeddings")
    theirs = GPT2LMHeadModel(GPT2Config(**width, **dropout, **shape, attn_implementation="eager"))
    check_against(theirs, GPT(cfg), from_gpt2, seq_len)


@pytest.mark.parametrize(
    "n_layer, n_head, n_kv_head, head_dim, d_ff, bias, tied, theta, seq_len",
    [
        (2, 4, 2, 16, None, False, True, 10_000.0, 31),
        (1, 3, 1, 10, 50, False, False, 500_000.0, 20),  # one layer, multi-query, an odd number of heads
        (3, 2, 2, 8, 33, True, False, 100.0, 9),
    ],
)
def test_llama_shape_is_transformers_llama(n_layer, n_head, n_kv_head, head_dim, d_ff, bias, tied, theta, seq_len):
    torch.manual_seed(n_layer)
    d_model = n_head * head_dim
    cfg = ModelConfig(
        n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, d_model=d_model, d_ff=d_ff, bias=bias, tie_embeddings=tied,
        rope_theta=theta, vocab_size=70,
    )  # fmt: skip
    theirs = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=n_layer, num_attention_heads=n_head, num_key_value_heads=n_kv_head, hidden_size=d_model,
            intermediate_size=cfg.hidden_dim, attention_bias=bias, mlp_bias=bias, tie_word_embeddings=tied, vocab_size=70,
            rms_norm_eps=cfg.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": theta}, rope_theta=theta,
            attn_implementation="eager",
        )
    )  # fmt: skip
    check_against(theirs, GPT(cfg), from_llama, seq_len)


@pytest.mark.parametrize("window_size", [1, 5, 40])
def test_a_window_is_mistrals(window_size):
    torch.manual_seed(window_size)
    cfg = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, window_size=window_size, vocab_size=70)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "vocab_size": 70}
    rest = {"intermediate_size": 48, "rms_norm_eps": cfg.norm_eps, "tie_word_embeddings": True, "attn_implementation": "eager"}
    theirs = MistralForCausalLM(MistralConfig(**shape, **rest, sliding_window=window_size))
    check_against(theirs, GPT(cfg), from_llama, seq_len=23)


def test_norms_of_queries_and_keys_and_windows_in_some_blocks_are_qwen3s():
    torch.manual_seed(0)
    parts = {"n_kv_head": 2, "qk_norm": True, "window_size": 5, "full_every": 3}
    cfg = ModelConfig(n_layer=4, n_head=4, d_model=32, d_ff=48, vocab_size=70, **parts)
    shape = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "vocab_size": 70}
    rest = {"intermediate_size": 48, "rms_norm_eps": cfg.norm_eps, "tie_word_embeddings": True, "attn_implementation": "eager"}
    windows = {"use_sliding_window": True, "sliding_window": 5, "head_dim": 8}
    layers = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    theirs = Qwen3ForCausalLM(Qwen3Config(**shape, **rest, **windows, layer_types=layers))
    check_against(theirs, GPT(cfg), from_llama, seq_len=23)


def test_a_softcap_is_gemma_2s(monkeypatch):
    net, tokens = small(LLAMA_PARTS, softcap=1.5), some_tokens()
    ours = net(tokens)

    def theirs(q, k, v, *, softcap, **others):
        module = torch.nn.Module()
        module.num_key_value_groups = q.shape[1] // k.shape[1]
        mask = torch.full((q.shape[2], k.shape[2]), -torch.inf).triu(1)[None, None]
        return gemma2_attention(module, q, k, v, mask, scaling=q.shape[-1] ** -0.5, softcap=softcap)[0].transpose(1, 2)

    monkeypatch.setattr(flash_ladder.model.gpt, "attention", theirs)
    torch.testing.assert_close(net(tokens), ours, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(small(LLAMA_PARTS)(tokens), ours, atol=1e-2)


@pytest.mark.parametrize("n_head", [1, 4, 12, 20])
def test_alibi_slopes_are_mpts(n_head):
    per_distance = -build_mpt_alibi_tensor(n_head, 2, alibi_bias_max=8)[:, 0, 0]  # of the position before
    assert sorted(alibi_slopes(n_head, torch.device("cpu")).tolist()) == pytest.approx(sorted(per_distance.tolist()))


def test_rotary_angles_are_llamas():
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    positions = torch.arange(100, 107)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    ours = rotary_angles(torch.zeros(1, 7, dtype=torch.int64), 100, 64, 5e5)
    torch.testing.assert_close(ours[:, :, 0], torch.stack((cos[0, :, :32], sin[0, :, :32])), rtol=0, atol=1e-5)


def test_rotary_angles_at_a_million_positions_are_exact():
    """Llama's own code, in float32, is off by 0.03 there."""
    ours = rotary_angles(torch.zeros(1, 3, dtype=torch.int64), 2**20, 64, 1e7)
    angles = [[(2**20 + s) / 1e7 ** (i / 32) for i in range(32)] for s in range(3)]
    exact = torch.tensor([[[function(a) for a in row] for row in angles] for function in (math.cos, math.sin)])
    torch.testing.assert_close(ours[:, :, 0], exact, rtol=0, atol=1e-7)


def test_parameters_are_counted_as_published():
    with torch.device("meta"):
        gpt2 = GPT(ModelConfig(**GPT2_PARTS, n_layer=12, n_head=12, n_kv_head=12, d_model=768, vocab_size=50257))
        untied = GPT(ModelConfig(**GPT2_PARTS, n_layer=1, d_model=64, vocab_size=100, max_seq_len=10, tie_embeddings=False))
        llama = GPT(ModelConfig(n_layer=16, n_head=32, n_kv_head=8, d_model=2048, d_ff=8192, vocab_size=128256))
    assert gpt2.n_params == 124_439_808
    assert gpt2.n_params_matmul == gpt2.n_params - 1024 * 768  # the position table is looked up, the tied embedding multiplies
    assert untied.n_params_matmul == untied.n_params - 10 * 64 - 100 * 64
    assert llama.n_params == llama.n_params_matmul == 1_235_814_400


# ---- what a position sees ----


@SHAPES
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_future_token_changes_no_earlier_logit(parts, backend):
    net, tokens = small(parts), some_tokens()
    net.backend = backend
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % SMALL["vocab_size"]
    before, after = net(tokens), net(changed)
    torch.testing.assert_close(after[:, :9], before[:, :9], rtol=0, atol=1e-6)
    assert ((after[:, 9:] - before[:, 9:]).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_document_in_a_row_is_as_the_document_alone(backend):
    net, tokens = small(LLAMA_PARTS), some_tokens(batch=1, seq_len=20)
    net.backend = backend
    lengths = (7, 1, 12)
    document_ids = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(lengths))[None]
    alone = torch.cat([net(document) for document in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(net(tokens, document_ids=document_ids), alone, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(net(tokens), alone, atol=1e-2)


@ALL_SHAPES
@pytest.mark.parametrize("pieces", [[1] * 17, [5, 1, 8, 3], [17]], ids=str)
def test_decoding_with_a_cache_is_the_full_forward(parts, pieces):
    net, tokens = small(parts), some_tokens()
    cache = KVCache(net.cfg, batch_size=2, max_len=17, device="cpu", dtype=torch.float32)
    net.activation_checkpointing = True  # for training; with a cache there is nothing to recompute
    decoded = torch.cat([net(piece, cache=cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(decoded, net(tokens), rtol=1e-5, atol=1e-5)
    assert cache.length == 17
    with pytest.raises(UserError, match="18 positions do not fit a KV cache of 17"):
        net(tokens[:, :1], cache=cache)


def test_a_learned_position_table_ends():
    net = small(GPT2_PARTS)
    net(some_tokens(seq_len=24))
    with pytest.raises(UserError, match="25 positions pass the learned position table"):
        net(some_tokens(seq_len=25))
    cache = KVCache(net.cfg, batch_size=2, max_len=100, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        net(some_tokens(seq_len=24), cache=cache)
        with pytest.raises(UserError, match="25 positions pass"):
            net(some_tokens(seq_len=1), cache=cache)
    assert small(LLAMA_PARTS)(some_tokens(seq_len=100)).shape == (2, 100, 80)  # rotary positions have no table


# ---- loss and initialisation ----


def test_the_loss_is_the_float32_mean_over_targets_that_count():
    net, tokens = small(LLAMA_PARTS), some_tokens()
    targets = tokens.roll(-1, 1)
    targets[0, 3:] = -100
    counted = targets != -100
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = net(tokens), net(tokens, targets)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits[counted].float(), targets[counted]))
    net.to(torch.bfloat16)
    torch.testing.assert_close(net(tokens, targets), F.cross_entropy(net(tokens)[counted].float(), targets[counted]))


def test_autocast_keeps_the_residual_stream_in_float32():
    net, seen = small(LLAMA_PARTS), []
    for block in net.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        net(some_tokens())
    assert seen == [torch.float32] * 2


@pytest.mark.parametrize("tied", [True, False])
def test_initialisation_is_gpt2s(tied):
    torch.manual_seed(0)
    net = GPT(ModelConfig(**GPT2_PARTS, n_layer=8, d_model=128, vocab_size=512, tie_embeddings=tied))
    for name, p in net.named_parameters():
        if p.dim() == 1:
            assert (p == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
        else:
            std = 0.02 / 4 if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < std / 20, name
    assert ("head.weight" in net.state_dict()) is not tied


# ---- copies, dtypes, compilation ----


@SHAPES
def test_attention_gets_views_of_one_projection_and_its_result_is_merged_without_a_copy(parts, monkeypatch):
    net, storages = small(parts, n_layer=1), {}

    def storage(x: torch.Tensor) -> int:
        return x.untyped_storage().data_ptr()

    def attention(q, k, v, **kwargs):
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        y = torch.zeros_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        storages.update(q=storage(q), k=storage(k), v=storage(v), y=storage(y), kept=(q, k, v, y))
        return y

    monkeypatch.setattr(flash_ladder.model.gpt, "attention", attention)
    layer = net.blocks[0].attention
    layer.qkv.register_forward_hook(lambda module, inputs, output: storages.update(qkv=storage(output)))
    layer.out.register_forward_pre_hook(lambda module, inputs: storages.update(merged=storage(inputs[0])))
    net(some_tokens())
    assert storages["v"] == storages["qkv"]
    assert storages["merged"] == storages["y"]
    if parts is GPT2_PARTS:
        assert storages["q"] == storages["k"] == storages["qkv"]
    else:
        assert storages["q"] == storages["k"]  # rotated in one go


def test_the_backend_may_change_at_any_time_and_every_block_follows(monkeypatch):
    net, asked = small(LLAMA_PARTS), []
    real = flash_ladder.model.gpt.attention
    monkeypatch.setattr(flash_ladder.model.gpt, "attention", lambda *a, **k: asked.append(k["backend"]) or real(*a, **k))
    net(some_tokens())
    net.backend = "sdpa"
    net(some_tokens())
    net.activation_checkpointing = True
    net(some_tokens())
    assert asked == ["eager"] * 2 + ["sdpa"] * 4


@ALL_SHAPES
def test_flash_v2_trains_and_decodes_as_eager(parts):
    pytest.importorskip("triton")
    net, tokens = small(parts, d_model=64), some_tokens(seq_len=12)
    parameters = list(net.parameters())
    expected_logits, expected_grads = net(tokens), gradients(net, tokens, parameters)
    net.backend = "flash_v2"  # on a CPU in Triton's interpreter
    torch.testing.assert_close(gradients(net, tokens, parameters), expected_grads, rtol=1e-4, atol=1e-5)
    cache = KVCache(net.cfg, batch_size=2, max_len=12, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        decoded = torch.cat([net(piece, cache=cache) for piece in tokens.split([9, 1, 2], dim=1)], dim=1)
    torch.testing.assert_close(decoded, expected_logits, rtol=1e-4, atol=1e-5)


@ALL_SHAPES
def test_activation_checkpointing_recomputes_and_changes_no_gradient(parts):
    net, tokens = small(parts), some_tokens()
    calls = []
    net.blocks[0].attention_norm.register_forward_hook(lambda *_: calls.append(1))
    expected = gradients(net, tokens, list(net.parameters()))
    assert len(calls) == 1
    net.activation_checkpointing = True
    torch.testing.assert_close(gradients(net, tokens, list(net.parameters())), expected, rtol=0, atol=0)
    assert len(calls) == 3


class Attends(TorchDispatchMode):
    """Counts how often attention's forward runs."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in flash_ladder.model.gpt.ATTENTION_OPERATORS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["flash_v2", "sdpa"])
def test_attention_runs_once_where_its_output_is_kept(backend):
    pytest.importorskip("triton")
    net, tokens = small(LLAMA_PARTS, d_model=64), some_tokens()
    net.backend, counts = backend, []
    expected = gradients(net, tokens, list(net.parameters()))
    for net.activation_checkpointing in (False, True, "keep_attention"):
        with Attends() as attends:
            torch.testing.assert_close(gradients(net, tokens, list(net.parameters())), expected, rtol=0, atol=0)
        counts.append(attends.count)
    assert counts == [2, 4, 2]


COMPILED = [(GPT2_PARTS, False), (LLAMA_PARTS, "keep_attention"), (ALIBI_PARTS, True)]


@pytest.mark.parametrize("parts, checkpointing", COMPILED, ids=str)
def test_it_compiles_as_one_graph(parts, checkpointing):
    net, tokens = small(parts), some_tokens()
    net.backend, net.activation_checkpointing = "sdpa", checkpointing
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        gradients(compiled, tokens, list(net.parameters())), gradients(net, tokens, list(net.parameters())), rtol=1e-5, atol=1e-6
    )
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(tokens, tokens), net(tokens, tokens))


@ALL_SHAPES
def test_it_can_be_built_on_the_meta_device(parts):
    source, tokens = small(parts), some_tokens()
    with torch.device("meta"):
        net = GPT(source.cfg)
    net.to_empty(device="cpu").init_weights()
    assert net(tokens).isfinite().all()
    net.load_state_dict(source.state_dict())
    torch.testing.assert_close(net(tokens), source(tokens), rtol=0, atol=0)


def test_rotary_angles_stay_float32_in_a_bfloat16_model():
    net, seen = small(LLAMA_PARTS).to(torch.bfloat16), []
    net.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].dtype))
    assert net(some_tokens()).dtype == torch.bfloat16
    assert seen == [torch.float32]
    x, angles = torch.randn(2, 17, 3, 8).bfloat16(), rotary_angles(some_tokens(), 1000, 8, 1e4)
    torch.testing.assert_close(rotate(x, angles), rotate(x.float(), angles).bfloat16(), rtol=0, atol=0)


def test_the_rotary_operator_is_registered_as_torch_wants_it():
    torch.library.opcheck(rotary_angles, (some_tokens(), 3, 8, 1e4))
