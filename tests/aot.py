"""Compiles the Triton rungs' kernels for a GPU that need not be here, and reads what came out.

`python -m tests.aot CAPABILITY DTYPE RUNG/MEANING/HEAD_DIM...` prints one JSON line for each kernel of each of these, as in
`python -m tests.aot 90 bfloat16 flash_v2/causal/64 flash_v1/everything/128`. Run it with TRITON_INTERPRET=0: a process that
interprets kernels cannot compile them.
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

from kernels import flash_v1, flash_v2, launch
from kernels.tiles import Tile, tiles_for, tiles_v1_for
from kernels.turing import tensor_cores

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
KERNELS = {
    "flash_v1": {"forward": flash_v1._forward_kernel, "backward": flash_v1._backward_kernel},
    "flash_v2": {"forward": flash_v2._forward_kernel, "dq": flash_v2.dq_kernel, "dkdv": flash_v2.dkdv_kernel},
}
# What does not come in the inputs' dtype, and what a kernel of flash_v1 keeps in float32 while it works.
POINTERS = {name: "*fp32" for name in ("LSE", "DLSE", "DELTA", "L", "M", "SLOPES")} | {"FIRST": "*i32", "LAST": "*i32"}
RUNNING = {("flash_v1", "forward"): {"O": "*fp32"}, ("flash_v1", "backward"): {"DQ": "*fp32"}}
# What each meaning leaves out: those arguments are None, as kernels.launch.meaning gives them.
MEANINGS = {
    "full": ("behind", "ahead", "FIRST", "LAST", "cap", "SLOPES"),
    "causal": ("behind", "FIRST", "LAST", "cap", "SLOPES"),
    "window": ("FIRST", "LAST", "cap", "SLOPES"),
    "documents": ("behind", "cap", "SLOPES"),
    "everything": (),
}


def compile_kernel(
    rung: str, name: str, capability: int, dtype: torch.dtype, head_dim: int, tile: Tile, meaning: str = "causal", group: int = 1
) -> dict:
    """Registers, stack bytes, shared memory and tensor-core instructions of one kernel, and its spills inside loops."""
    kernel = KERNELS[rung][name]
    constants = {
        "GROUP": group,
        "RAGGED": meaning == "everything",
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "PRECISION": launch.precision(dtype, head_dim),
        "WIDE": False,
    } | dict.fromkeys(MEANINGS[meaning])
    if meaning != "everything":
        constants["DLSE"] = None
    pointers = POINTERS | RUNNING.get((rung, name), {})
    signature, aligned = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.isupper():
            signature[argument] = pointers.get(argument, f"*{TYPES[dtype]}")
            aligned[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument in ("scale", "cap") else "i32"
            if argument.startswith("stride") and head_dim % 8 == 0:  # as in a model with an even number of heads
                aligned[(position,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in signature}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    with tensor_cores(divmod(capability, 10)) as turing:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=tile.options() | turing)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        sass = _run("cuobjdump", "-sass", cubin.name)
        usage = _run("cuobjdump", "-res-usage", cubin.name)
    return {
        "kernel": f"{rung} {name}",
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
    for rung, meaning, head_dim in (asked.split("/") for asked in sys.argv[3:]):
        size = int(head_dim)
        chosen = tiles_v1_for(dtype, size) if rung == "flash_v1" else tiles_for(divmod(capability, 10), dtype, size)
        for name in KERNELS[rung]:
            result = compile_kernel(rung, name, capability, dtype, size, getattr(chosen, name), meaning)
            print(json.dumps({"capability": capability, "head_dim": size, "meaning": meaning} | result), flush=True)
