"""Other people's attention behind one signature, and what is said of a package that is not there or broken."""

import sys
import types

import pytest
import torch

import flash_ladder.benchmark.peers as peers
from flash_ladder.benchmark.peers import NotInstalled, installed_package, one_line, peer, why_not_installed
from flash_ladder.kernels import Unsupported, attention
from flash_ladder.machine.hardware import EXTRAS
from flash_ladder.names import PEERS, Peer
from flash_ladder.script_schema import BenchmarkConfig

CPU = torch.device("cpu")


def inputs(n_kv_head: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, 48, 16, generator=generator) for heads in (4, n_kv_head, n_kv_head)]


def test_the_configuration_knows_them_all():
    BenchmarkConfig(backends=list(PEERS)).validate()


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", ["math", "fa2"])
def test_pytorchs_own(name, is_causal):
    found = peer(name, is_causal=is_causal, seq_len=48, device=CPU)(*inputs())
    torch.testing.assert_close(found, attention(*inputs(), is_causal=is_causal, backend="eager"))


def test_a_kernel_that_pytorch_has_not():
    with pytest.raises(Unsupported, match="PyTorch has no CUDNN_ATTENTION kernel"):
        peer("cudnn", is_causal=True, seq_len=48, device=CPU)(*inputs())


@pytest.fixture
def module(monkeypatch):
    """Puts a module, or an error on importing it, where a package would be."""

    def put(name: str, **contents) -> None:
        made = types.ModuleType(name)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)

    return put


def on_sequence_first(query, key, value, causal, window_size=(-1, -1)):
    """flash_attn_func's layout, [B, S, H, D], and its window, keys to the left and to the right; returns the log-sum-exp too."""
    assert query.shape[1:] == (48, 4, 16) and key.shape[1:] == (48, 2, 16) and window_size[1] == (-1 if window_size[0] < 0 else 0)
    output, lse = attention(
        *(x.transpose(1, 2) for x in (query, key, value)), is_causal=causal, return_lse=True, backend="eager",
        window_size=None if window_size[0] < 0 else window_size[0] + 1,
    )  # fmt: skip
    return output.transpose(1, 2), lse


def sequence_by_sequence(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
    """flash_attn_varlen_func's layout: the sequences one after the other, [tokens, H, D]."""
    assert query.shape == (48, 4, 16) and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) == max_seqlen_q == max_seqlen_k and torch.equal(cu_seqlens_q, cu_seqlens_k) and sum(lengths) == 48
    pieces = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([attention(*piece, is_causal=causal, backend="eager")[0].transpose(0, 1) for piece in pieces])


@pytest.mark.parametrize("name", ["fa3_fwd_interface", "flash_attn_interface"])
def test_a_package(module, name):
    module(name, flash_attn_func=on_sequence_first)
    assert why_not_installed("fa3") is None
    found = peer("fa3", is_causal=True, seq_len=48, device=CPU)(*inputs())
    torch.testing.assert_close(found, attention(*inputs(), is_causal=True, backend="eager"))


@pytest.mark.parametrize("window_size", [1, 7, 48])
def test_a_package_under_a_window(module, window_size):
    module("flash_attn", flash_attn_func=on_sequence_first)
    found = peer("flash_attn", is_causal=True, seq_len=48, device=CPU, window_size=window_size)(*inputs())
    torch.testing.assert_close(found, attention(*inputs(), is_causal=True, window_size=window_size, backend="eager"))


@pytest.mark.parametrize("lengths", [[48], [16, 16, 16], [1, 40, 7]])
def test_a_package_on_packed_documents(module, lengths):
    module("flash_attn", flash_attn_varlen_func=sequence_by_sequence)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    one = [x[:1] for x in inputs()]
    found = peer("flash_attn", is_causal=True, seq_len=48, device=CPU, document_ids=ids)(*one)
    torch.testing.assert_close(found, attention(*one, is_causal=True, document_ids=ids, backend="eager"))


@pytest.mark.parametrize("name", ["flash_attn", "fa3", "fa4"])
def test_a_package_that_is_not_there(monkeypatch, name):
    for module in ("flash_attn", "flash_attn.cute", "fa3_fwd_interface", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, None)  # Python's own sign for "not to be found"
    assert why_not_installed(name) == "not installed"
    with pytest.raises(NotInstalled, match="not installed"):
        peer(name, is_causal=True, seq_len=48, device=CPU)


def test_a_package_that_is_broken(module, tmp_path, monkeypatch):
    module("flash_attn")
    assert "flash_attn cannot be imported: AttributeError" in why_not_installed("flash_attn")
    (tmp_path / "fa3_fwd_interface.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    assert why_not_installed("fa3") == "fa3_fwd_interface needs a_package_that_nobody_has, which is not installed"


def test_a_new_peer_is_an_entry_and_its_function(monkeypatch):
    """Its function gets what it asked for, and a mask only where there is one."""
    asked = []
    monkeypatch.setitem(PEERS, "mine", Peer("mine", takes_masks=True))
    monkeypatch.setitem(peers.MAKERS, "mine", lambda **what: asked.append(what))
    for mask in ({}, {"window_size": 5}):
        peer("mine", is_causal=True, seq_len=48, device=CPU, **mask)
        assert asked.pop() == {"is_causal": True, "seq_len": 48, "device": CPU, **mask}
    assert why_not_installed("mine") is None and installed_package("mine") is None


def test_the_package_of_a_peer(monkeypatch):
    monkeypatch.setattr(peers, "version_of", {"flash-attn-3": "3.0.0"}.get)
    assert installed_package("fa3") == "flash-attn-3 3.0.0"
    assert installed_package("fa4") is None and installed_package("fa2") is None


def test_the_doctor_looks_for_every_peer():
    """machine.hardware has a line for each module that a peer may come from, with the packages that bring it."""
    listed = {module: packages for module, packages, _ in EXTRAS}
    for name, entry in PEERS.items():
        assert [package for module in entry.modules for package in listed[module]] == list(entry.packages), name


def test_what_needs_no_package():
    assert why_not_installed("math") is None and why_not_installed("flex") is None


def test_an_error_in_one_line():
    assert one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert one_line(ValueError()) == "ValueError:"
    deep = RuntimeError("set_params, /build/flash-attention/hopper/flash_api.cpp:231, This build has no a/b:1, sorry")
    assert one_line(deep) == "RuntimeError: set_params, This build has no a/b:1, sorry"
    assert len(one_line(ValueError("x" * 1000))) == 300
