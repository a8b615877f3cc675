"""Runs a block of inline PTX on a warp of numpy lanes. It knows the few instructions of flash_v3's softmax."""

import re

import numpy as np
import torch

LANES = 32


def run(text: str, operands: list[np.ndarray]) -> None:
    """Executes `text`; `operands` are $0, $1, ..., of 32 lanes each, float32 or uint32, and are written in place."""
    registers: dict[str, np.ndarray] = {f"${i}": operand for i, operand in enumerate(operands)}
    *statements, end = [statement.strip() for statement in text.strip("{} ").split(";")]
    assert end == "DONE:", "branches lead to the end, and nowhere else"
    for statement in statements:
        if statement.startswith(".reg"):
            continue
        branch = re.fullmatch(r"@!(\w+) bra DONE", statement)
        if branch:
            taken = ~registers[branch[1]]
            assert taken.all() or not taken.any(), "a branch that not all lanes take"
            if taken.all():
                return
            continue
        operation, arguments = statement.split(None, 1)
        target, *sources = [argument.strip() for argument in arguments.split(",")]
        result = _result(operation, [_value(source, registers) for source in sources])
        if target in registers:
            registers[target][...] = result
        else:
            registers[target] = np.array(np.broadcast_to(result, LANES))


def _value(source: str, registers: dict[str, np.ndarray]) -> np.ndarray | int:
    if source.startswith("0f"):
        return np.array(int(source[2:], 16), np.uint32).view(np.float32)
    return registers[source] if source in registers else int(source)


def _result(operation: str, x: list) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        match operation:
            case "mov.f32":
                return x[0]
            case "add.f32":
                return x[0] + x[1]
            case "mul.f32":
                return x[0] * x[1]
            case "neg.f32":
                return -x[0]
            case "max.f32":
                return np.fmax(x[0], x[1])
            case "fma.rn.f32":
                return (x[0].astype(np.float64) * x[1] + x[2]).astype(np.float32)
            case "ex2.approx.ftz.f32":
                return np.exp2(x[0])
            case "setp.gt.f32":
                return x[0] > x[1]
            case "setp.gt.or.f32":
                return (x[0] > x[1]) | x[2]
            case "setp.neu.f32":
                return ~(x[0] == x[1])
            case "setp.neu.or.f32":
                return ~(x[0] == x[1]) | x[2]
            case "vote.sync.any.pred":
                return np.full(LANES, x[0].any())
            case "shfl.sync.bfly.b32":
                return x[0][np.arange(LANES) ^ x[1]]
            case "cvt.rn.bf16x2.f32":
                return (half_bits(x[0], torch.bfloat16) << 16) | half_bits(x[1], torch.bfloat16)
            case "cvt.rn.f16x2.f32":
                return (half_bits(x[0], torch.float16) << 16) | half_bits(x[1], torch.float16)
    raise ValueError(f"{operation} is not among the instructions that tests/helpers/ptx.py knows")


def half_bits(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float32, rounded to a half-precision dtype -> its 16 bits, in uint32."""
    return torch.from_numpy(x.astype(np.float32)).to(dtype).view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
