"""Other people's attention, which the rungs are measured beside, each as a function of query, key and value [B, H, S, D].

flash_ladder.names says what each peer is: whose, from which package, what it takes. The functions are here: fa2, cudnn, efficient
and math are PyTorch's own kernels behind F.scaled_dot_product_attention; flex is FlexAttention, compiled; flash_attn, fa3 and fa4
are the packages of FlashAttention 2, 3 and 4, where they are installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_ladder.kernels import Unsupported
from flash_ladder.machine.hardware import version_of
from flash_ladder.machine.sdpa_choice import is_a_refusal
from flash_ladder.names import PEERS

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of batch, head, query i and key j: whether i sees j


class NotInstalled(Exception):
    """A peer's package cannot be imported here; the message says why."""


def peer(
    name: str,
    *,
    is_causal: bool,
    seq_len: int,
    device: torch.device,
    window_size: int | None = None,
    document_ids: Tensor | None = None,
) -> Attend:
    """The peer `name` for inputs of length `seq_len`. It prepares here what it needs (a block mask), outside any timing.

    window_size, document_ids [1, S]: at most one of the two, a causal mask for a peer that takes masks.
    Raises NotInstalled here, and Unsupported from the function where PyTorch has no such kernel for its inputs.
    """
    mask = {"window_size": window_size, "document_ids": document_ids}
    given = {name: value for name, value in mask.items() if value is not None}
    return MAKERS[name](is_causal=is_causal, seq_len=seq_len, device=device, **given)


def why_not_installed(name: str) -> str | None:
    """Why the peer cannot be imported here, or None where it can."""
    try:
        if PEERS[name].modules:
            exported(tuple(PEERS[name].modules), "flash_attn_func")
    except NotInstalled as error:
        return str(error)
    return None


def installed_package(name: str) -> str | None:
    """The package that the peer comes from with its version, "fa3-fwd 0.0.3"; None where it is PyTorch's own or not installed."""
    for package_name in PEERS[name].packages:
        if version := version_of(package_name):
            return f"{package_name} {version}"
    return None


# ---- the functions that make them ----


def sdpa(kernel: SDPBackend, *, is_causal: bool, seq_len: int, device: torch.device) -> Attend:
    """F.scaled_dot_product_attention, restricted to one of its kernels."""

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


def sees(window_size: int | None = None, document_ids: Tensor | None = None) -> Sees:
    """Causality and a mask as FlexAttention takes them; document_ids [1, S]."""
    if window_size is not None:
        return lambda batch, head, i, j: (i >= j) & (i - j < window_size)
    if document_ids is not None:
        ids = document_ids[0]
        return lambda batch, head, i, j: (i >= j) & (ids[i] == ids[j])
    return lambda batch, head, i, j: i >= j


def flex(
    *,
    is_causal: bool,
    seq_len: int,
    device: torch.device,
    window_size: int | None = None,
    document_ids: Tensor | None = None,
) -> Attend:
    """Compiled FlexAttention; its block mask lets it skip the tiles that causality and the mask hide. A mask asks for is_causal."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Every shape compiles a graph. The count must not reach the limit beyond which torch runs the function uncompiled.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    visible = sees(window_size, document_ids)
    block_mask = create_block_mask(visible, None, None, seq_len, seq_len, device=device) if is_causal else None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(query, key, value, block_mask=block_mask, enable_gqa=query.shape[1] != key.shape[1])

    return attend


def package(
    modules: tuple[str, ...],
    *,
    is_causal: bool,
    seq_len: int,
    device: torch.device,
    window_size: int | None = None,
    document_ids: Tensor | None = None,
) -> Attend:
    """flash_attn_func of an installed package. Transposed views go in and out; nothing is copied. A mask asks for is_causal."""
    if document_ids is not None:
        return packed(modules, document_ids)
    function = exported(modules, "flash_attn_func")
    window = {} if window_size is None else {"window_size": (window_size - 1, 0)}  # keys to the left of the query, and to the right

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=is_causal, **window)
        return first_of(output).transpose(1, 2)

    return attend


def packed(modules: tuple[str, ...], document_ids: Tensor) -> Attend:
    """flash_attn_varlen_func of an installed package: the documents of one sequence, ids [1, S], as causal sequences of their own.

    The package needs each document's begin, which is found here, outside any timing.
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
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):  # the module is there, what it needs is not
                raise NotInstalled(f"{module} needs {error.name}, which is not installed") from None
        except Exception as error:  # a package built for another torch fails in its own way
            raise NotInstalled(f"{module} cannot be imported: {one_line(error)}") from None
    raise NotInstalled("not installed")


def one_line(error: Exception) -> str:
    """An error in one line: "TypeError: what it says", cut where it is too long, and without places in a package's source."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.sub(r"/\S+\.(cpp|cu|h):\d+,? ?", "", text)
    return text if len(text) <= 300 else text[:299] + "…"


# ---- the table ----

# For each peer of flash_ladder.names, the function that makes it from is_causal, seq_len, device, and window_size or document_ids
# where it takes masks. A package's peer calls flash_attn_func on [B, S, H, D].
MAKERS: dict[str, Callable[..., Attend]] = {
    "fa2": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "efficient": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "math": partial(sdpa, SDPBackend.MATH),
    "flex": flex,
    **{name: partial(package, tuple(entry.modules)) for name, entry in PEERS.items() if entry.modules},
}
