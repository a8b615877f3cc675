"""How many FLOPs a token costs, and how many a GPU can do: the two halves of model FLOPs utilisation (MFU).

Both conventions for attention are kept. Full counts every pair of positions, as PaLM (Chowdhery et al., 2022, appendix B) and
nanoGPT do, so that figures compare; causal counts the half that a causal model needs, so that figures mean something.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# Dense peaks in TFLOP/s from NVIDIA's datasheets and architecture whitepapers: (bf16, fp16, fp32). Products of bf16 and fp16 are
# summed in float32, which GeForce cards do at half rate; fp32 is without TF32. Sparse figures, twice as high, are not used.
# The peaks hold at the boost clock of the reference design: a card with another clock has another peak.
PEAKS: dict[str, tuple[float | None, float | None, float]] = {
    # Blackwell
    "GB200": (2500, 2500, 80),
    "B200": (2250, 2250, 75),
    "RTX 5090": (209.5, 209.5, 104.8),
    "RTX 5080": (112.6, 112.6, 56.3),
    "RTX 5070 Ti": (87.9, 87.9, 43.9),
    "RTX 5070": (61.7, 61.7, 30.9),
    # Hopper; a name without a suffix is the SXM board
    "GH200": (989, 989, 67),
    "H200 NVL": (835, 835, 60),
    "H200": (989, 989, 67),
    "H100 PCIe": (756, 756, 51),
    "H100 NVL": (835, 835, 60),
    "H100": (989, 989, 67),
    "H800": (989, 989, 67),
    "H20": (148, 148, 44),
    # Ada
    "L40S": (362, 362, 91.6),
    "L40": (181, 181, 90.5),
    "L4": (121, 121, 30.3),
    "RTX 6000 Ada": (364.2, 364.2, 91.1),
    "RTX 4090": (165.2, 165.2, 82.6),
    "RTX 4080 SUPER": (104.4, 104.4, 52.2),
    "RTX 4080": (97.5, 97.5, 48.7),
    "RTX 4070 Ti SUPER": (88.2, 88.2, 44.1),
    "RTX 4070 Ti": (80.2, 80.2, 40.1),
    "RTX 4070 SUPER": (71.0, 71.0, 35.5),
    "RTX 4070": (58.3, 58.3, 29.1),
    "RTX 4060 Ti": (44.1, 44.1, 22.1),
    "RTX 4060": (30.2, 30.2, 15.1),
    # Ampere
    "A100": (312, 312, 19.5),
    "A800": (312, 312, 19.5),
    "A40": (149.7, 149.7, 37.4),
    "A30": (165, 165, 10.3),
    "A10": (125, 125, 31.2),
    "A10G": (70, 70, 35),
    "RTX A6000": (154.8, 154.8, 38.7),
    "RTX A5000": (111.1, 111.1, 27.8),
    "RTX A4000": (76.7, 76.7, 19.2),
    "RTX 3090 Ti": (80, 80, 40),
    "RTX 3090": (71, 71, 35.6),
    "RTX 3080 Ti": (68.2, 68.2, 34.1),
    "RTX 3080": (59.5, 59.5, 29.8),
    "RTX 3070 Ti": (43.5, 43.5, 21.7),
    "RTX 3070": (40.6, 40.6, 20.3),
    "RTX 3060 Ti": (32.4, 32.4, 16.2),
    "RTX 3060": (25.5, 25.5, 12.7),
    # Turing and Volta have no bf16
    "T4": (None, 65, 8.1),
    "TITAN RTX": (None, 130.5, 16.3),
    "Quadro RTX 8000": (None, 130.5, 16.3),
    "Quadro RTX 6000": (None, 130.5, 16.3),
    "RTX 2080 Ti": (None, 53.8, 13.4),
    "RTX 2080": (None, 40.3, 10.1),
    "RTX 2070": (None, 29.9, 7.5),
    "V100-SXM2": (None, 125, 15.7),
    "V100-PCIE": (None, 112, 14),
}
COLUMN = {"bf16-mixed": 0, "16-mixed": 1, "32": 2}

# What follows the model's name if the GPU is another, slower chip, or a slice of this one.
ANOTHER_CHIP = {"ti", "super", "d", "v2", "laptop", "mobile", "max", "mig"}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Dense peak of one GPU in TFLOP/s for "bf16-mixed", "16-mixed" or "32"; None for a GPU that is not in the table.

    device_name: as torch.cuda.get_device_name gives it, "NVIDIA H100 PCIe".
    """
    for model in sorted(PEAKS, key=len, reverse=True):  # the longest name first: an H100 PCIe is not an H100
        found = re.search(rf"\b{re.escape(model)}\b(.*)", device_name, re.IGNORECASE)
        if found:
            rest = re.split(r"[^a-z0-9]+", found[1].lower())
            return None if ANOTHER_CHIP & set(rest) else PEAKS[model][COLUMN[precision]]
    return None


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token's forward and backward pass, recomputation not counted."""

    full: float  # 6 N + 12 L S d
    causal: float  # 6 N + 6 L (S + 1) d


def flops_per_token(n_params_matmul: int, n_layer: int, d_model: int, seq_len: int, windows: Sequence[int] = ()) -> TokenFlops:
    """FLOPs per token of training.

    n_params_matmul: N, the parameters that multiply. Tables that are only looked up do not; a tied embedding does, as the head.
    windows: one for each of the blocks that have one. Such a block counts a window of keys where others count all.
    """
    matmul = 6.0 * n_params_matmul
    per_key = 12.0 * d_model  # Q Kᵀ and P V are 4 d FLOPs a key and layer, and the backward is twice the forward
    seen = [min(window, seq_len) for window in windows] + [seq_len] * (n_layer - len(windows))
    full, causal = sum(seen), sum(w * (1 - (w - 1) / (2 * seq_len)) for w in seen)  # the first w positions see fewer
    return TokenFlops(full=matmul + per_key * full, causal=matmul + per_key * causal)


BACKWARD = 2.5  # times the forward's FLOPs: five matrix products to two


def forward_flops(batch_size: int, n_head: int, seq_len: int, head_dim: int, is_causal: bool) -> float:
    """FLOPs of attention's forward, by which kernels are compared: 4·B·H·S²·D, half of it if causal, whatever they recompute."""
    return 4.0 * batch_size * n_head * seq_len**2 * head_dim * (0.5 if is_causal else 1.0)


def attention_flops(batch_size: int, n_head: int, seq_len: int, head_dim: int) -> float:
    """FLOPs of one causal attention layer, forward and backward."""
    return (1 + BACKWARD) * forward_flops(batch_size, n_head, seq_len, head_dim, is_causal=True)
