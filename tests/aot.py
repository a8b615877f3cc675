"""Compiles flash_v2's kernels for a GPU that need not be here, and reads what came out.

`python -m tests.aot CAPABILITY DTYPE HEAD_DIM...` prints one JSON line per kernel and head_dim. Run it with TRITON_INTERPRET=0:
a process that interprets kernels cannot compile them.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import flash_v2
from kernels.tiles import Tile, tiles_for

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
KERNELS = {"forward": flash_v2._forward_kernel, "dq": flash_v2._dq_kernel, "dkdv": flash_v2._dkdv_kernel}
FLOAT32_POINTERS = {"LSE", "DLSE", "DELTA"}


def compile_kernel(name: str, capability: int, dtype: torch.dtype, head_dim: int, tile: Tile, is_causal: bool = True) -> dict:
    """Registers, stack bytes, shared memory and tensor-core instructions of one kernel, and its spills inside loops."""
    kernel = KERNELS[name]
    constants = {
        "IS_CAUSAL": is_causal,
        "RAGGED": False,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "PRECISION": flash_v2.precision(dtype, head_dim),
        "WIDE": False,
        "DLSE": None,
    }
    signature, aligned = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.isupper():
            signature[argument] = "*fp32" if argument in FLOAT32_POINTERS else f"*{TYPES[dtype]}"
            aligned[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
            if argument.startswith("stride") and head_dim % 16 == 0:
                aligned[(position,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in signature}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        sass = _run("cuobjdump", "-sass", cubin.name)
        usage = _run("cuobjdump", "-res-usage", cubin.name)
    return {
        "kernel": name,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared_kib": compiled.metadata.shared / 1024,
        "tensor_core": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b", sass)),
        "loop_spills": loop_spills(sass),
    }


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([BINARIES / tool, *arguments], capture_output=True, text=True, check=True).stdout


def loop_spills(sass: str) -> int:
    """Local-memory loads and stores inside the innermost loops that multiply matrices."""
    code = {int(m[1], 16): m[2] for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)}
    loops = []
    for address, instruction in code.items():
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", instruction)
        if jump and int(jump[1], 16) < address:
            loops.append((int(jump[1], 16), address))
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    spills = 0
    for first, last in innermost:
        body = [instruction for address, instruction in code.items() if first <= address <= last]
        if any(re.search(r"\b(HMMA|HGMMA|UTCHMMA|FFMA)\b", instruction) for instruction in body):
            spills += sum(bool(re.search(r"\b(LDL|STL)\b", instruction)) for instruction in body)
    return spills


if __name__ == "__main__":
    capability, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    for head_dim in map(int, sys.argv[3:]):
        chosen = tiles_for(divmod(capability, 10), dtype, head_dim)
        for name in KERNELS:
            result = compile_kernel(name, capability, dtype, head_dim, getattr(chosen, name))
            print(json.dumps({"capability": capability, "head_dim": head_dim} | result), flush=True)
