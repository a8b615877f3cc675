"""Units of memory, as numbers and in words."""

from __future__ import annotations

GIB = 2**30


def size(n_bytes: float) -> str:
    """Bytes in words, to three digits: "2.13 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.3g} TiB"
