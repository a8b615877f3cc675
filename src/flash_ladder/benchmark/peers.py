"""Other people's attention, each as a function of query, key and value [B, H, S, D]: what the rungs are measured beside.

fa2, cudnn, efficient and math are PyTorch's own kernels behind F.scaled_dot_product_attention, by name; flex is FlexAttention,
compiled; flash_attn, fa3 and fa4 are the packages of FlashAttention 2, 3 and 4, where they are installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_ladder.kernels import Unsupported
from flash_ladder.machine.sdpa_choice import is_a_refusal

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of batch, head, query i and key j: whether i sees j

SDPA = {
    "fa2": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Modules that export flash_attn_func(query, key, value, causal=...) on [B, S, H, D], and flash_attn_varlen_func for sequences one
# after the other; the first that is there is taken.
PACKAGES = {
    "flash_attn": ("flash_attn",),
    "fa3": ("fa3_fwd_interface", "flash_attn_interface"),
    "fa4": ("flash_attn.cute",),
}
PEERS = (*SDPA, "flex", *PACKAGES)


class NotInstalled(Exception):
    """A peer's package cannot be imported here; the message says why."""


def peer(name: str, *, is_causal: bool, seq_len: int, device: torch.device) -> Attend:
    """The peer `name` for inputs of length `seq_len`. What it prepares (a block mask) is prepared here, outside any timing.

    Raises NotInstalled here, and Unsupported from the function where PyTorch has no such kernel for its inputs.
    """
    if name in SDPA:
        return sdpa(SDPA[name], is_causal)
    if name == "flex":
        return flex(causal if is_causal else None, seq_len, device)
    return package(PACKAGES[name], is_causal)


def why_not_installed(name: str) -> str | None:
    """Why the peer cannot be imported here, or None where it can."""
    try:
        if name in PACKAGES:
            exported(PACKAGES[name], "flash_attn_func")
    except NotInstalled as error:
        return str(error)
    return None


def sdpa(kernel: SDPBackend, is_causal: bool) -> Attend:
    """F.scaled_dot_product_attention held to one of its kernels."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        try:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=grouped)
        except RuntimeError as error:
            if is_a_refusal(error):
                raise Unsupported(f"PyTorch has no {kernel.name} kernel for this") from None
            raise

    return attend


def causal(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The causal mask as FlexAttention takes it."""
    return i >= j


def flex(sees: Sees | None, seq_len: int, device: torch.device) -> Attend:
    """Compiled FlexAttention; its block mask lets it skip the tiles that `sees` hides. None: every query sees every key."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # A graph compiled for every shape: the count of earlier ones must not reach the limit beyond which it would run uncompiled.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    mask = None if sees is None else create_block_mask(sees, None, None, seq_len, seq_len, device=device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1])

    return attend


def package(modules: tuple[str, ...], is_causal: bool, window_size: int | None = None) -> Attend:
    """flash_attn_func of an installed package. Transposed views go in and out; nothing is copied. A window asks for is_causal."""
    function = exported(modules, "flash_attn_func")
    window = {} if window_size is None else {"window_size": (window_size - 1, 0)}  # keys to the left of the query, and to the right

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=is_causal, **window)
        return first_of(output).transpose(1, 2)

    return attend


def packed(modules: tuple[str, ...], document_ids: Tensor) -> Attend:
    """flash_attn_varlen_func of an installed package: the documents of one sequence, ids [1, S], as causal sequences of their own.

    Where each begins is found here, outside any timing; the package wants it so.
    """
    function = exported(modules, "flash_attn_varlen_func")
    lengths = document_ids[0].unique_consecutive(return_counts=True)[1]
    ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max())

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [S, H, D]
        output = function(
            query, key, value, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
        )
        return first_of(output).transpose(0, 1)[None]

    return attend


def first_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output alone: some packages return the log-sum-exp as well."""
    return output[0] if isinstance(output, tuple) else output


def exported(modules: tuple[str, ...], name: str) -> Callable:
    """The function `name` of the first of `modules` that is installed; raises NotInstalled."""
    for module in modules:
        try:
            return getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):  # it is there, and something it needs is not
                raise NotInstalled(f"{module} needs {error.name}, which is not installed") from None
        except Exception as error:  # a package built for another torch fails in its own way
            raise NotInstalled(f"{module} cannot be imported: {one_line(error)}") from None
    raise NotInstalled("not installed")


def one_line(error: Exception) -> str:
    """An error in one line: "TypeError: what it says", cut where it says too much; without places in a package's own source."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.sub(r"/\S+\.(cpp|cu|h):\d+,? ?", "", text)
    return text if len(text) <= 300 else text[:299] + "…"
