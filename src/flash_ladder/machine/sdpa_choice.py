"""Which kernel PyTorch's scaled_dot_product_attention takes for a call, found by asking PyTorch.

The questions use public functions only. `can_use_*_attention` is PyTorch's verdict on a call at its full size, on a GPU. With the
kernels that pass switched on, the operation runs once on a short sequence, and the output's `grad_fn` names the kernel that ran.
With that kernel switched off, the same question names the next one; so the order is found. A kernel that is the only one switched
on and refuses warns with its reasons.

The kernel called "flash" is FlashAttention-2, built into PyTorch, unless the user has activated another one in its place.
torch.nn.attention keeps a registry of those (FA3 and FA4, from packages of their own), which `flash_in_words` reads.
"""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_ladder.kernels import attention

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
VERDICTS = {  # PyTorch has these functions for a GPU only
    "cudnn": cuda.can_use_cudnn_attention,
    "flash": cuda.can_use_flash_attention,
    "efficient": cuda.can_use_efficient_attention,
}
SWITCHES = {
    "cudnn": cuda.cudnn_sdp_enabled,
    "flash": cuda.flash_sdp_enabled,
    "efficient": cuda.mem_efficient_sdp_enabled,
    "math": cuda.math_sdp_enabled,
}
NODES = {  # how the name of a kernel's backward begins; math consists of other operations
    "cudnn": "ScaledDotProductCudnnAttention",
    "flash": "ScaledDotProductFlashAttention",
    "efficient": "ScaledDotProductEfficientAttention",
}
HEADINGS = {"cudnn": "cudnn attention kernel", "flash": "flash attention kernel", "efficient": "memory efficient kernel"}
BUILT_IN_FLASH = "FlashAttention-2 (built in)"
FLASH_NAMES = {"FA3": "FlashAttention-3", "FA4": "FlashAttention-4"}  # by the names in PyTorch's registry
NOT_FLASH = "CUDNN"  # is in the same registry, but replaces the cuDNN kernel
MASKS = frozenset({"window_size", "alibi_slopes", "document_ids"})  # kernels.sdpa passes these as an explicit mask
SHORT = 128  # positions of the sequence that is run; no kernel treats longer ones differently

# PyTorch's reasons in plain words. A reason that is missing here is shown in PyTorch's own words.
PLAIN = (
    (r"dtype: \{(.*?)\}", "takes {} only"),
    (r"last dimension and to be less than or equal to (\d+)", "takes head_dim up to {}"),
    (r"last dimension of inputs to be divisible by (\d+)", "takes a head_dim that {} divides"),
    (r"head_dim should be no more than (\d+)", "takes head_dim up to {}"),
    (r"head_dim should be a multiple of (\d+)", "takes a head_dim that {} divides"),
    (r"architectures in the range ?\[sm_?(\d+), sm_?(\d+)\]", "runs on sm_{} to sm_{} only"),
    (r"support non-null attn_mask", "takes no mask but the causal one"),
    (r"not compiled with", "is not in this build of PyTorch"),
    (r"runtime disabled", "is switched off in PyTorch"),
    (r"not deterministic", "is not deterministic"),
    (r"to have the same num_heads", "takes as many key/value heads as query heads"),
)
DTYPE_NAMES = (("BFloat16", "bfloat16"), ("Half", "float16"), ("Float", "float32"))


@dataclass(frozen=True)
class AttentionCall:
    """A call of `kernels.attention`: its shape and the arguments that it uses."""

    device: torch.device
    dtype: torch.dtype
    batch_size: int
    n_head: int
    n_kv_head: int
    seq_len: int
    head_dim: int
    features: frozenset[str]  # the arguments of `attention` in use: "is_causal", "window_size", ...


@dataclass(frozen=True)
class SdpaChoice:
    """PyTorch's kernels for a call."""

    order: list[str]  # the kernels that can run it, in the order in which PyTorch tries them: the first one runs
    refused: dict[str, str]  # the other kernels, with PyTorch's reasons


def ask_sdpa(call: AttentionCall) -> SdpaChoice:
    """Which kernel `attention(backend="sdpa")` runs for a call that asks for gradients.

    The question leaves out softcap, return_lse and deterministic, for which PyTorch's operation has no argument.
    Raises RuntimeError where the device cannot run anything.
    """
    with torch.cuda.device(call.device) if call.device.type == "cuda" else nullcontext():
        there = KERNELS if call.device.type == "cuda" else ("flash", "math")
        left = [name for name in there if SWITCHES[name]()]
        refused = {name: "is switched off in PyTorch" for name in there if name not in left}
        if call.device.type == "cuda":
            query, key, value, mask = _at_full_size(call)
            causal = "is_causal" in call.features and mask is None
            params = cuda.SDPAParams(query, key, value, mask, 0.0, causal, call.n_head != call.n_kv_head)
            unable = [name for name in left if name in VERDICTS and not VERDICTS[name](params)]
            refused |= {name: _reasons(call, name) for name in unable}
            left = [name for name in left if name not in unable]
        order: list[str] = []
        while left:
            name = _kernel_that_runs(call, left)
            if name is None:  # on a CPU, where PyTorch does not say beforehand
                return SdpaChoice(order, refused | {name: _reasons(call, name) for name in left})
            order.append(name)
            left.remove(name)
    return SdpaChoice(order, refused)


def flash_in_words(device: torch.device) -> str:
    """Which FlashAttention PyTorch's flash kernel is on `device`, and which others are registered.

    "FlashAttention-2 (built in); FA3, FA4 registered, not activated" on an NVIDIA GPU where the user activated none.
    """
    if device.type == "cpu":
        return "PyTorch's own kernel for CPUs; FlashAttention-2, 3 and 4 are for GPUs"
    if torch.version.hip:
        return "AMD's kernel, built in"
    list_registered = getattr(nn.attention, "list_flash_attention_impls", list)  # an older PyTorch has no registry
    active = getattr(nn.attention, "current_flash_attention_impl", lambda: None)()
    registered = [name for name in list_registered() if name not in (active, NOT_FLASH)]
    words = BUILT_IN_FLASH if active in (None, NOT_FLASH) else f"{FLASH_NAMES.get(active, active)} (activated)"
    return f"{words}; {', '.join(registered)} registered, not activated" if registered else words


def _kernel_that_runs(call: AttentionCall, kernels: list[str]) -> str | None:
    """The kernel that PyTorch takes with only `kernels` switched on, found by running a short sequence; None where none can run."""
    seq_len = min(call.seq_len, SHORT)
    query, key, value = (
        torch.zeros(1, seq_len, heads, call.head_dim, dtype=call.dtype, device=call.device, requires_grad=True).transpose(1, 2)
        for heads in (call.n_head, call.n_kv_head, call.n_kv_head)
    )
    meaning: dict[str, Any] = {
        "window_size": 1,
        "alibi_slopes": torch.ones(call.n_head, device=call.device),
        "document_ids": torch.zeros(1, seq_len, dtype=torch.int32, device=call.device),
    }
    used = {name: value for name, value in meaning.items() if name in call.features}
    try:
        with sdpa_kernel([KERNELS[name] for name in kernels]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = attention(query, key, value, is_causal="is_causal" in call.features, backend="sdpa", **used)
    except RuntimeError as error:
        if is_a_refusal(error):
            return None
        raise
    return _kernel_behind(output)


def _kernel_behind(output: Tensor) -> str:
    """The kernel that made `output`, by the names of the backward nodes that lead to it."""
    nodes = [cast("Node", output.grad_fn)]  # not None: the inputs ask for gradients
    for node in nodes:  # grows as it is walked
        for name, beginning in NODES.items():
            if node.name().startswith(beginning):
                return name
        nodes += [before for before, _ in node.next_functions if before is not None]
    return "math"


def _at_full_size(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key, value and mask in their real shapes, in the memory of one position: to ask about, not to run."""
    query, key, value = (
        torch.zeros(1, 1, heads, call.head_dim, dtype=call.dtype, device=call.device, requires_grad=True)
        .expand(call.batch_size, call.seq_len, heads, call.head_dim)
        .transpose(1, 2)
        for heads in (call.n_head, call.n_kv_head, call.n_kv_head)
    )
    if not call.features & MASKS:
        return query, key, value, None
    has_bias = "alibi_slopes" in call.features
    batch = call.batch_size if "document_ids" in call.features else 1
    mask = torch.zeros(call.seq_len, dtype=call.dtype if has_bias else torch.bool, device=call.device)  # a whole row: stride 1
    return query, key, value, mask.expand(batch, call.n_head if has_bias else 1, call.seq_len, call.seq_len)


def _reasons(call: AttentionCall, kernel: str) -> str:
    """Why PyTorch refuses `kernel`, from its warnings with only that kernel switched on. It refuses before it runs anything."""
    query, key, value, mask = _at_full_size(call)
    causal = "is_causal" in call.features and mask is None
    with sdpa_kernel(KERNELS[kernel]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=call.n_head != call.n_kv_head
            )
        except RuntimeError as error:
            if not is_a_refusal(error):
                raise
            said = [str(warning.message) for warning in caught] + str(error).splitlines()
    return "; ".join(reasons_under(HEADINGS[kernel], said)) or "PyTorch gives no reason"


def is_a_refusal(error: RuntimeError) -> bool:
    """Whether this error says that none of the kernels that PyTorch may use takes the call."""
    return "No available kernel" in str(error) or "No viable backend" in str(error)


def reasons_under(heading: str, said: list[str]) -> list[str]:
    """The reasons that PyTorch gives under `heading`, in plain words.

    said: its warnings in order; every "X kernel not used because:" begins the reasons of X.
    """
    found, inside = [], False
    for line in said:
        if "not used because" in line:
            inside = heading in line.lower()
        elif inside and not line.startswith("No "):
            found.append(plain(line))
    return found


def plain(reason: str) -> str:
    """One of PyTorch's reasons in plain words, without its place in PyTorch's source."""
    for pattern, words in PLAIN:
        match = re.search(pattern, reason)
        if match:
            told = words.format(*match.groups())
            for name, ours in DTYPE_NAMES:
                told = re.sub(rf"\b{name}\b", ours, told)
            return told
    return re.split(r"\s*\(Triggered internally| Got | Attempting to run", reason)[0].strip().rstrip(".")
