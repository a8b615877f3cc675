"""Units of memory, as numbers and in words, and times in words."""

from __future__ import annotations

GIB = 2**30


def size(n_bytes: float) -> str:
    """Bytes in words, to three digits: "2.13 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.3g} TiB"


def duration(seconds: float) -> str:
    """A time in words, to two digits: "45 s", "12 min", "1.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36_000 else f"{seconds / 3600:.0f} h"
