"""What scripts/hub_kernel.py does: the kernels as a folder that Hugging Face's package `kernels` loads.

    build/torch-universal/      the only build: Python alone, for every torch and every GPU
        __init__.py             exports attention, choose and flash_attn's names
        metadata.json           what `kernels` reads before it imports anything
        ladder/                 a copy of flash_ladder.kernels, whose imports of itself are relative
    README.md                   the model card of a repository on the hub

`kernels` imports a build under the id of its metadata, and the operators' namespace follows that name. The id holds a digest of the
sources, so that builds of different sources, and the installed package, live in one process.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import cast

import flash_ladder.kernels
from flash_ladder.files import replace_folder, write_json
from flash_ladder.script_schema import HubKernelConfig

NAME = "flash-ladder"
BUILD = Path("build", "torch-universal")
METADATA = "metadata.json"
LICENSE = "Apache-2.0"

INIT = '''"""Flash Ladder's attention: one operation on several backends, and flash_attn's names for it."""

from .ladder import attention, choose
from .ladder.doors.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

__all__ = ["attention", "choose", "flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
'''

CARD = f"""---
library_name: kernels
license: {LICENSE.lower()}
---
# Flash Ladder's attention

```python
from kernels import get_kernel

ladder = get_kernel("OWNER/{NAME}", version=VERSION, trust_remote_code=True)
out = ladder.attention(query, key, value, is_causal=True)  # [B, H, S, D]; ladder.choose says which backend runs
out = ladder.flash_attn_func(q, k, v, causal=True)  # [B, S, H, D], as flash_attn's
```

Written in Triton and Gluon: it needs torch 2.11 to 2.15 and no compiler of its own.
"""


def write_hub_kernel(cfg: HubKernelConfig) -> None:
    """Writes the folder `cfg.out`. Raises UserError where it cannot be written, or holds other files."""
    out = Path(cast("str", cfg.out))  # validate() refuses a missing one
    source = Path(flash_ladder.kernels.__file__).parent
    files = {path.relative_to(source): path.read_bytes() for path in sorted(source.rglob("*.py"))}
    ours = ("README.md", "build") if (out / BUILD / METADATA).is_file() else ()  # others have a folder of that name too
    with replace_folder(out, ours) as folder:
        build = folder / BUILD
        for path, content in files.items():
            (build / "ladder" / path).parent.mkdir(parents=True, exist_ok=True)
            (build / "ladder" / path).write_bytes(content)
        (build / "__init__.py").write_text(INIT, encoding="utf-8")
        write_json(build / METADATA, metadata(files, cfg.version))
        (folder / "README.md").write_text(CARD.replace("VERSION", str(cfg.version)), encoding="utf-8")
    print(f"written to {out}; kernels.get_local_kernel(Path({str(out)!r})) loads it")


def metadata(files: dict[Path, bytes], version: int) -> dict:
    """What `kernels` asks of a build. `files`: its sources, by their path in the package."""
    digest = hashlib.sha256()
    for path, content in files.items():
        digest.update(f"{path.as_posix()}\0{len(content)}\0".encode() + content)
    return {
        "name": NAME,
        "id": f"{NAME.replace('-', '_')}_{digest.hexdigest()[:12]}",
        "version": version,
        "license": LICENSE,
        "python-depends": [],  # beyond torch, which brings Triton
        "backend": {"type": "cuda"},
    }
