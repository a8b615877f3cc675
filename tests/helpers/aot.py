"""Compiles the rungs' kernels for a GPU that need not be present, and reads the machine code.

`python -m tests.helpers.aot CAPABILITY DTYPE RUNG/MEANING/HEAD_DIM...` prints one JSON line for each of their kernels, as in
`python -m tests.helpers.aot 90 bfloat16 flash_v2/causal/64 flash_v1/everything/128`. Run it with TRITON_INTERPRET=0: a process that
interprets kernels cannot compile them.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from flash_ladder.kernels import flash_v1, flash_v2, launch
from flash_ladder.kernels.asked import Numbers
from flash_ladder.kernels.flash_v3 import launch as flash_v3
from flash_ladder.kernels.flash_v3.protocol import width_of
from flash_ladder.kernels.tiles import Tile, tiles_for, tiles_v1_for
from flash_ladder.kernels.turing import tensor_cores

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
KERNELS = {
    "flash_v1": {"forward": flash_v1._forward_kernel, "backward": flash_v1._backward_kernel},
    "flash_v2": {"forward": flash_v2._forward_kernel, "dq": flash_v2.dq_kernel, "dkdv": flash_v2.dkdv_kernel},
}
SPILL = r"\b(LDL|STL)\b"
# Arguments in another dtype than the inputs', and those that a kernel of flash_v1 keeps in float32 while it works.
POINTERS = {name: "*fp32" for name in ("LSE", "DLSE", "DELTA", "L", "M", "SLOPES")} | {"FIRST": "*i32", "LAST": "*i32"}
RUNNING = {("flash_v1", "forward"): {"O": "*fp32"}, ("flash_v1", "backward"): {"DQ": "*fp32"}}
# The arguments that each meaning leaves out: they are None, as kernels.asked.numbers_for_kernels gives them.
MEANINGS = {
    "full": ("behind", "ahead", "FIRST", "LAST", "cap", "SLOPES"),
    "causal": ("behind", "FIRST", "LAST", "cap", "SLOPES"),
    "window": ("FIRST", "LAST", "cap", "SLOPES"),
    "documents": ("behind", "cap", "SLOPES"),
    "slopes": ("behind", "FIRST", "LAST", "cap"),
    "everything": (),
}


def is_cut(meaning: str) -> bool:
    """Whether anything but causality masks or changes the scores."""
    return meaning not in ("full", "causal")


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
        "FLAT": False,
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
    return {"kernel": f"{rung} {name}"} | read(compiled)


def inputs(dtype: torch.dtype, head_dim: int, meaning: str, seq: int, reach: int = 511) -> flash_v3.Inputs:
    """Inputs as flash_v3 describes them; `reach`: how far back a window goes."""
    numbers = Numbers(1.0, reach, 0, 1.0)
    numbers = numbers._replace(**{name: None for name in MEANINGS[meaning] if name in numbers._fields})
    documents, slopes = "FIRST" not in MEANINGS[meaning], "SLOPES" not in MEANINGS[meaning]
    return flash_v3.Inputs(torch.device("cuda"), dtype, (1, 1, seq, head_dim), 1, seq, numbers, documents, slopes)


def compile_flash_v3(given: flash_v3.Inputs, setting: flash_v3.Forward | bool, output_dtype: torch.dtype | None = None) -> dict:
    """`compile_kernel` for flash_v3 on Hopper: the forward with this setting, or the backward, deterministic or not."""
    dtype, block_d = given.dtype, given.block_d()

    def descriptor(*block: int, of: torch.dtype = dtype, layout: NVMMASharedLayout | None = None) -> str:
        return f"tensordesc<{TYPES[of]}[{','.join(map(str, block))}],{layout or flash_v3._layout(block, of)!r}>"

    if isinstance(setting, flash_v3.Forward):
        name, kernel, values = "forward", flash_v3.forward_kernel, flash_v3.forward_constants(given, setting)
        rows, keys = descriptor(1, 1, 64, block_d), descriptor(1, 1, setting.block_k, block_d)
        pointers = {
            "q_desc": rows,
            "k_desc": keys,
            "v_desc": keys,
            "o_desc": descriptor(1, 1, 64, flash_v3.output_width(block_d, output_dtype or dtype), of=output_dtype or dtype),
        }
        options, consumers = {"maxnreg": setting.registers()[2]}, setting.warpgroups
    else:
        name, kernel, values = "backward", flash_v3.backward_kernel, flash_v3.backward_constants(given, setting)
        rows = descriptor(1, 1, 64, width_of(block_d))
        pointers = dict.fromkeys(("q_desc", "do_desc", "k_desc", "v_desc", "dk_desc", "dv_desc"), rows) | {
            "stats_desc": descriptor(1, 128, of=torch.float32, layout=flash_v3.FLAT),
            "dq_desc": descriptor(128, 32, of=torch.float32),
        }
        options, consumers = {"maxnreg": flash_v3.BACKWARD_REGISTERS}, 2
    pointers |= {"lse_ptr": "*fp32", "first_ptr": "*i32", "last_ptr": "*i32", "slopes_ptr": "*fp32", "counter": "*i32"}
    left_out = [name for name, value in given.numbers._asdict().items() if value is None]
    left_out += [] if given.documents else ["first_ptr", "last_ptr"]
    left_out += [] if given.slopes else ["slopes_ptr"]
    constants = dict.fromkeys(left_out) | values._asdict()
    signature = {
        argument: "constexpr"
        if argument in constants
        else pointers.get(argument, "fp32" if argument in ("scale", "cap") else "i32")
        for argument in kernel.arg_names
    }
    source = GluonASTSource(kernel, signature=signature, constexprs=constants, attrs={})
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=flash_v3.OPTIONS | options)
    return {"kernel": f"flash_v3 {name}"} | read(result, consumers)


def read(compiled: Any, consumers: int = 0) -> dict:
    """Figures of the machine code. Of the steady loops, one for each of flash_v3's consumers, the worst one counts."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        sass = _run("cuobjdump", "-sass", cubin.name)
        usage = _run("cuobjdump", "-res-usage", cubin.name)
    loops = matrix_loops(sass)
    steady = steady_loops(loops, consumers)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared_kib": compiled.metadata.shared / 1024,
        "tensor_core": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b", sass)),
        "tma": len(re.findall(r"\bUTMA(?:LDG|STG|REDG)\b", sass)),
        "register_moves": [int(n, 16) for n in re.findall(r"\bUSETMAXREG\S* (?:UP\d, )?0x([0-9a-f]+)", sass)],
        "loop_spills": loop_spills(loops),
        "steady_instructions": max(map(len, steady), default=0),
        "steady_spills": max((_count(SPILL, body) for body in steady), default=0),
        "overwritten": sum(len(overwritten(body)) for body in loops),
        "steady_waits": max((_count(r"\bWARPGROUP\.DEPBAR\b", body) for body in steady), default=0),
    }


def kernels_of_flash_v3(dtype: torch.dtype, head_dim: int, meaning: str) -> list[tuple[flash_v3.Inputs, flash_v3.Forward | bool]]:
    """Inputs and setting of every kernel that flash_v3 may take: for short sequences and long ones, narrow windows and wide."""
    found = {}
    for seq, reach in itertools.product((1024, 8192), (511, 4095)):
        given = inputs(dtype, head_dim, meaning, seq, reach)
        setting = flash_v3.forward_setting(given)
        found.setdefault(flash_v3.forward_constants(given, setting), (given, setting))
        for deterministic in (False, True):
            found.setdefault(flash_v3.backward_constants(given, deterministic), (given, deterministic))
    return list(found.values())


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([BINARIES / tool, *arguments], capture_output=True, text=True, check=True).stdout


def matrix_loops(sass: str) -> list[list[str]]:
    """The instructions of each innermost loop that multiplies matrices."""
    code = {int(m[1], 16): m[2] for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)}
    loops = []
    for address, instruction in code.items():
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", instruction)
        if jump and int(jump[1], 16) < address:
            loops.append((int(jump[1], 16), address))
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[instruction for address, instruction in code.items() if first <= address <= last] for first, last in innermost]
    return [body for body in bodies if _count(r"\b(HMMA|HGMMA|UTCHMMA|FFMA)\b", body)]


def loop_spills(loops: list[list[str]]) -> int:
    """Local-memory loads and stores inside loops."""
    return sum(_count(SPILL, body) for body in loops)


def steady_loops(loops: list[list[str]], consumers: int) -> list[list[str]]:
    """The loops that flash_v3 spends its time in, one for each consumer: the shortest of those with most products. The other loops
    mask, and all consumers make the same products."""
    products = max((_count(r"\bHGMMA\b", body) for body in loops), default=0)
    return sorted((body for body in loops if _count(r"\bHGMMA\b", body) == products), key=len)[:consumers]


def overwritten(loop: list[str]) -> list[str]:
    """Instructions in two rounds of a loop that write a register which a product in flight may still read.

    The assembler of CUDA 12.9 is known to let this happen where a product of Hopper reads its first factor from registers. Such a
    product reads four. It has read them once `WARPGROUP.DEPBAR.LE gsb0, N` leaves at most N groups of products running.
    """
    found, reading, groups = [], [], 0
    for instruction in (re.sub(r"^@!?U?P\w+ ", "", x) for x in loop * 2):
        if instruction.startswith("HGMMA"):
            if factor := re.match(r"HGMMA\S* R\d+, R(\d+), gdesc", instruction):
                reading.append((groups, int(factor[1])))
            groups += "gsb0" in instruction
        elif wait := re.match(r"WARPGROUP\.DEPBAR\S* gsb0, 0x(\w+)", instruction):
            reading = [x for x in reading if groups - x[0] <= int(wait[1], 16)]
        elif target := re.match(r"(?!ST|RED|ATOM|SYNCS|UTMA)(\S+) (?:U?P[\dT]+, )?R(\d+)\b", instruction):
            width = 4 if ".128" in target[1] else 2 if re.search(r"\.(64|WIDE)", target[1]) else 1
            first = int(target[2])
            found += [instruction for _, factor in reading if first < factor + 4 and first + width > factor]
    return found


def _count(pattern: str, instructions: list[str]) -> int:
    return sum(bool(re.search(pattern, instruction)) for instruction in instructions)


if __name__ == "__main__":
    capability, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    for rung, meaning, head_dim in (asked.split("/") for asked in sys.argv[3:]):
        size = int(head_dim)
        about = {"triton": triton.__version__, "capability": capability, "dtype": sys.argv[2]}
        about |= {"head_dim": size, "meaning": meaning}
        if rung == "flash_v3":
            for given, setting in kernels_of_flash_v3(dtype, size, meaning):
                is_forward = isinstance(setting, flash_v3.Forward)
                about["deterministic"] = setting is True
                for output_dtype in (dtype, torch.float32) if is_forward and meaning == "causal" else (dtype,):
                    print(json.dumps(about | compile_flash_v3(given, setting, output_dtype)), flush=True)
            continue
        chosen = (
            tiles_v1_for(dtype, size) if rung == "flash_v1" else tiles_for(divmod(capability, 10), dtype, size, is_cut(meaning))
        )
        for name in KERNELS[rung]:
            result = compile_kernel(rung, name, capability, dtype, size, getattr(chosen, name), meaning)
            print(json.dumps(about | result), flush=True)
