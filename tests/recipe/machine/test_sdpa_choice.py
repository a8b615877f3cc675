"""Which of its kernels PyTorch takes for a call, and why it takes no other."""

import warnings

import pytest
import torch

from flash_ladder.machine import sdpa_choice
from flash_ladder.machine.sdpa_choice import AttentionCall, SdpaChoice, ask_sdpa, flash_in_words, plain, reasons_under

CPU = torch.device("cpu")


def asked(features=("is_causal",), **change):
    shape = {"device": CPU, "dtype": torch.float32, "batch_size": 2, "n_head": 4, "n_kv_head": 2, "seq_len": 64, "head_dim": 16}
    return AttentionCall(**shape | change, features=frozenset(features))


@pytest.mark.parametrize(
    "features", [(), ("is_causal",), ("window_size",), ("is_causal", "document_ids"), ("alibi_slopes", "document_ids")]
)
def test_sdpa_on_a_cpu(features):
    assert ask_sdpa(asked(features)) == SdpaChoice(["flash", "math"], {})


def test_sdpa_without_flash():
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert ask_sdpa(asked()) == SdpaChoice(["math"], {"flash": "is switched off in PyTorch"})
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def test_a_shape_is_asked_about_and_not_allocated():
    huge = asked(("is_causal", "document_ids", "alibi_slopes"), batch_size=10**4, seq_len=10**6)
    query, _, value, mask = sdpa_choice._at_full_size(huge)
    assert query.shape == (10**4, 4, 10**6, 16) and value.shape == (10**4, 2, 10**6, 16) and query.stride(-1) == 1
    assert mask.shape == (10**4, 4, 10**6, 10**6) and mask.untyped_storage().nbytes() == 4 * 10**6 and query.requires_grad
    assert ask_sdpa(huge).order == ["flash", "math"]


def test_a_kernel_that_refuses_says_why(monkeypatch):
    """As on a GPU: the verdicts come first, and what is refused is asked for its reasons."""
    said = [
        "Memory efficient kernel not used because: (Triggered internally at /a/sdp_utils.cpp:915.)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at /a/sdp_utils_cpp.h:552.)",
        "Flash attention kernel not used because: (Triggered internally at /a/sdp_utils.cpp:917.)",
        "Expected query, key and value to all be of dtype: {Half, BFloat16}. Got Query dtype: float, Key dtype: float instead.",
        "cuDNN attention kernel not used because: (Triggered internally at /a/sdp_utils.cpp:919.)",
        "cuDNN attention has been runtime disabled. (Triggered internally at /a/sdp_utils.cpp:700.)",
    ]

    def refuse(*inputs, **options):
        for line in said:
            warnings.warn(line, stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(sdpa_choice.F, "scaled_dot_product_attention", refuse)
    assert sdpa_choice._reasons(asked(), "flash") == "takes float16, bfloat16 only"
    assert reasons_under("memory efficient kernel", said) == ["is switched off in PyTorch"]
    said.clear()
    assert sdpa_choice._reasons(asked(), "cudnn") == "PyTorch gives no reason"


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Flash Attention does not support non-null attn_mask.", "takes no mask but the causal one"),
        ("head_dim should be no more than 128 (Triggered internally at x)", "takes head_dim up to 128"),
        (
            "Flash attention only supports gpu architectures in the range [sm80, sm121]. Attempting to run",
            "runs on sm_80 to sm_121 only",
        ),
        ("Something new. Got 3 instead. (Triggered internally at x)", "Something new"),
    ],
)
def test_plain_words(reason, words):
    assert plain(reason) == words


# ---- which FlashAttention its flash kernel is ----


@pytest.mark.parametrize(
    ("registered", "active", "words"),
    [
        (["FA3", "FA4"], None, "FlashAttention-2 (built in); FA3, FA4 registered, not activated"),
        (["FA3", "FA4"], "FA3", "FlashAttention-3 (activated); FA4 registered, not activated"),
        (["FA4"], "FA4", "FlashAttention-4 (activated)"),
        (["CUDNN", "FA3", "FA4"], "CUDNN", "FlashAttention-2 (built in); FA3, FA4 registered, not activated"),
        (["FA3", "Somebody's"], "Somebody's", "Somebody's (activated); FA3 registered, not activated"),
        ([], None, "FlashAttention-2 (built in)"),
    ],
)
def test_whose_flash_attention_it_is(monkeypatch, registered, active, words):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", lambda: registered)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: active)
    assert flash_in_words(torch.device("cuda")) == words
    assert flash_in_words(CPU).startswith("PyTorch's own kernel for CPUs")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert flash_in_words(torch.device("cuda")) == "AMD's kernel, built in"


def test_nobody_but_the_user_activates_one():
    """Asked of the PyTorch that is installed."""
    assert flash_in_words(torch.device("cuda")).startswith("FlashAttention-2 (built in)")


def test_a_pytorch_without_the_registry(monkeypatch):
    for name in ("list_flash_attention_impls", "current_flash_attention_impl"):
        monkeypatch.delattr(torch.nn.attention, name)
    assert flash_in_words(torch.device("cuda")) == "FlashAttention-2 (built in)"
