"""The reference of every kernel test: float64 attention, and the error of a result against it."""

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flash_ladder.kernels import attention, eager
from flash_ladder.kernels.asked import Asked
from flash_ladder.kernels.choice import why_not

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON_RUNGS = ("flash_v1", "flash_v2")  # these also run without a GPU, in Triton's interpreter
HOPPER = why_not("flash_v3", DEVICE, torch.float16, 64, frozenset()) is None
RUNGS = (*TRITON_RUNGS, "flash_v3") if HOPPER else TRITON_RUNGS
NAMES = ("output", "lse", "dq", "dk", "dv")


@dataclass
class Case:
    """Inputs, exactly representable in `dtype`, and the upstream gradients of output and log-sum-exp."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_output: Tensor
    grad_lse: Tensor
    dtype: torch.dtype

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        return [x.to(dtype) for x in (self.query, self.key, self.value)]


def make_case(batch, n_head, n_kv_head, seq_q, seq_k, head_dim, dtype, *, seed=0, size=1.0) -> Case:
    """Random normal inputs; `size` scales query and key."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    query = (size * normal(batch, n_head, seq_q, head_dim)).to(dtype).double()
    key = (size * normal(batch, n_kv_head, seq_k, head_dim)).to(dtype).double()
    value = normal(batch, n_kv_head, seq_k, head_dim).to(dtype).double()
    grad_output = normal(batch, n_head, seq_q, head_dim).to(dtype).double()
    return Case(query, key, value, grad_output, normal(batch, n_head, seq_q).float().double(), dtype)


def slopes(n_head: int) -> Tensor:
    """ALiBi slopes of n_head heads, float32 [Hq], all different and unordered, so that a mixed-up head shows."""
    return torch.tensor([0.5, 0.03, 0.2, 0.1], device=DEVICE)[:n_head]


def documents(seq: int, *cuts: tuple[int, ...]) -> Tensor:
    """Document ids int64 [B, seq], one batch entry for each tuple of positions at which a new document starts; ids have gaps."""
    ids = torch.zeros(len(cuts), seq, dtype=torch.int64, device=DEVICE)
    for entry, starts in zip(ids, cuts, strict=True):
        for start in starts:
            entry[start:] += 3
    return ids


# Arguments of attention, with windows and slopes that matter at a hundred positions. Slopes are for two query heads.
MEANINGS = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window_size": 20},
    "causal window": {"is_causal": True, "window_size": 45},
    "window of one": {"window_size": 1},
    "causal window of one": {"is_causal": True, "window_size": 1},
    "window beyond the end": {"window_size": 1000},
    "causal window beyond the end": {"is_causal": True, "window_size": 1000},
    "softcap": {"is_causal": True, "softcap": 2.0},
    "full softcap": {"softcap": 0.5},
    "alibi": {"is_causal": True, "alibi_slopes": slopes(2)},
    "full alibi": {"alibi_slopes": slopes(2)},
    "scale": {"is_causal": True, "scale": 0.9},
    "negative scale": {"is_causal": True, "scale": -0.3},
    "zero scale": {"is_causal": True, "scale": 0.0},
    "everything": {"is_causal": True, "window_size": 50, "softcap": 2.0, "alibi_slopes": slopes(2), "scale": -0.3},
}


def finest(backend: str) -> torch.dtype:
    """The most precise dtype up to float32 that a backend takes, for tests that are not about a dtype."""
    return torch.float16 if backend == "flash_v3" else torch.float32


def skip_unless_runs(backend: str, dtype: torch.dtype, head_dim: int, **meaning) -> None:
    """Skips the test, with the backend's own reason, where the backend cannot run this."""
    used = frozenset(name for name, value in meaning.items() if name != "scale" and value is not None and value is not False)
    reason = why_not(backend, DEVICE, dtype, head_dim, used)
    if reason is not None:
        pytest.skip(reason)


def run(case: Case, dtype: torch.dtype, **meaning) -> tuple[Tensor, ...]:
    """Output, lse, dq, dk, dv of one backend in one dtype."""
    inputs = [x.requires_grad_() for x in case.inputs(dtype)]
    output, lse = attention(*inputs, return_lse=True, **meaning)
    grads = torch.autograd.grad((output, lse), inputs, (case.grad_output.to(output.dtype), case.grad_lse.to(lse.dtype)))
    return output, lse, *grads


def n_unlike(
    backend: str,
    found: tuple[Tensor, ...],
    again: tuple[Tensor, ...],
    names: tuple[str, ...] = NAMES,
    *,
    deterministic: bool = False,
) -> Tensor:
    """How many elements differ between two runs of a backend, on the device. All results but flash_v3's dq must have equal bits.

    Without `deterministic`, flash_v3 adds up dq in float32 in an order that changes from run to run. After rounding, dq may be the
    neighbouring value, or off by what float32 loses where large terms cancel. A term lost or added twice moves it by far more.
    """
    unlike = torch.zeros((), dtype=torch.int64, device=found[0].device)
    for name, a, b in zip(names, found, again, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        if backend == "flash_v3" and name == "dq" and not deterministic:
            a, b = a.detach().float(), b.detach().float()
            limit = torch.finfo(found[0].dtype).eps * torch.maximum(a.abs(), b.abs()) + 2**-16 * b.abs().max()
            unlike += (~((a - b).abs() <= limit)).sum()
        else:
            unlike += (a != b).sum()
    return unlike


class Error(NamedTuple):
    """The error of a result: its root mean square and its maximum, each over that of the exact values."""

    rms: float
    max: float


def error(result: Tensor, exact: Tensor) -> Error:
    """The error of finite values; infinities must stand in the same places."""
    result, exact = result.detach().double(), exact.detach().double()
    assert not result.isnan().any(), "NaN in the result"
    assert torch.equal(result.isinf(), exact.isinf()), "infinities differ"
    finite = exact.isfinite()
    if not finite.any():
        return Error(0.0, 0.0)
    exact, difference = exact[finite], (result - exact)[finite]
    rms = difference.pow(2).mean().sqrt() / exact.pow(2).mean().sqrt().clamp_min(1e-30)
    return Error(rms.item(), (difference.abs().max() / exact.abs().max().clamp_min(1e-30)).item())


def errors(results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, Error]:
    return {name: error(a, b) for name, a, b in zip(NAMES, results, exact, strict=True)}


# The relative error that any value stored in this dtype may have: one rounding, and a little.
FLOOR = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 5e-7}


def probabilities(case: Case, **meaning) -> Tensor:
    """softmax(Q Kᵀ · scale + mask), float64 [B, Hq, Sq, Sk]: what attention makes of the unit vectors as values."""
    seq_k = case.key.shape[2]
    every = torch.eye(seq_k, dtype=torch.float64, device=DEVICE).expand(*case.key.shape[:2], -1, -1)
    return eager.attend(case.query, case.key, every, Asked(**meaning))[0]


def roundings(case: Case, exact: tuple[Tensor, ...], p: Tensor, scale: float) -> dict[str, float]:
    """How far one float32 rounding of every term in the sums moves the worst element, over the largest exact element.

    Eager attention's error does not bound this. Where a row sees one or two keys, dp - delta is nearly zero, and torch's softmax
    loses nothing of it. A kernel that takes delta from rowsum(do * o) must, and one that keeps lse instead of p rounds an exponent.
    `p` are the `probabilities`, at this scale.
    """
    group = case.query.shape[1] // case.key.shape[1]
    query, do = case.query.abs(), case.grad_output.abs()
    key, value = (x.abs().repeat_interleave(group, 1) for x in (case.key, case.value))
    output, lse = exact[0].detach().abs(), exact[1].detach().abs()
    exponent = abs(scale) * query @ key.mT + lse.masked_fill(lse.isinf(), 0.0)[..., None]
    p = p * (1 + exponent)
    ds = abs(scale) * p * (do @ value.mT + ((do * output).sum(-1) + case.grad_lse.abs())[..., None])
    dk, dv = ((x.mT @ y).unflatten(1, (-1, group)).sum(2) for x, y in ((ds, query), (p, do)))
    terms = {"output": p @ value, "lse": exponent, "dq": ds @ key, "dk": dk, "dv": dv}
    largest = {name: x[x.isfinite()].abs().amax() for name, x in zip(NAMES, exact, strict=True)}
    return {name: 2**-24 * (terms[name].amax() / largest[name].clamp_min(1e-30)).item() for name in NAMES}


def exponent_roundings(case: Case, exact: tuple[Tensor, ...], p: Tensor, scale: float) -> dict[str, float]:
    """By how much, by root mean square, gradients are off because p = exp(s - lse) has its exponent in float32.

    Three roundings reach it: of s and of lse on their way to base 2, and of the lse that the forward stored. Each is taken as
    uniform and independent, of 2^-24 at most, relative to its number; p, and with it ds, is off by their sum. Eager attention
    subtracts the row's maximum instead and has next to none of this, so a row with a large lse shows it.
    """
    group = case.query.shape[1] // case.key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (case.key, case.value))
    output, lse = exact[0].detach(), exact[1].detach()
    lse = lse.masked_fill(lse.isinf(), 0.0)[..., None]
    s = torch.where(p > 0, p.clamp_min(1e-300).log() + lse, 0.0)
    squares = 2**-48 / 3 * (s.square() + 2 * lse.square())  # of p's relative error
    delta = (case.grad_output * output).sum(-1) - case.grad_lse
    ds = scale * p * (case.grad_output @ value.mT - delta[..., None])
    p, ds = (x.square() * squares for x in (p, ds))
    dk, dv = ((x.mT @ y.square()).unflatten(1, (-1, group)).sum(2) for x, y in ((ds, case.query), (p, case.grad_output)))
    of_grads = dict(zip(("dq", "dk", "dv"), (ds @ key.square(), dk, dv), strict=True))
    whole = dict(zip(NAMES, exact, strict=True))
    return {
        name: (x.mean().sqrt() / whole[name].detach().square().mean().sqrt().clamp_min(1e-30)).item()
        for name, x in of_grads.items()
    }


def judge(
    found: dict[str, Error],
    eagers: dict[str, Error],
    floors: dict[str, Error],
    exponents: dict[str, float],
    lse: Tensor,
    factor: float,
) -> None:
    """Asserts that errors are within `factor` of what eager attention loses in the same precision, for all five results.

    By root mean square and at the worst element. Gradients may instead be off by eager's error plus what p = exp(s - lse)
    inherits. By root mean square that is `exponents`. On a GPU it is also the hardware's exponential, taken to be right to two
    units in the last place (2^-22), and the rounding of the stored float32 lse, which scales a whole row. Only float32 notices.
    """
    lse = lse[lse.isfinite()].abs()
    inherited = 2**-22 + 2**-24 * lse.max().item() if DEVICE.type == "cuda" and lse.numel() else 0.0
    for name in NAMES:
        for kind, error, eager_error, floor in zip(Error._fields, found[name], eagers[name], floors[name], strict=True):
            allowed = factor * max(eager_error, floor)
            if name in exponents:
                allowed = max(allowed, eager_error + inherited, eager_error + exponents[name] if kind == "rms" else 0.0)
            assert error <= allowed, f"{name}: {kind} error {error:.2e}, eager has {eager_error:.2e}, and {allowed:.2e} is allowed"


def two_sums(head_dim: int) -> float:
    """The root mean square error of two float32 sums of head_dim random products that are added one after another.

    The scores and dp, which dq and dk are made of, are such sums. In the interpreter numpy computes them. Its BLAS adds one after
    another on some processors (OPENBLAS_CORETYPE=SkylakeX, Sandybridge) and by parts on others (Haswell, Zen); torch's adds by
    parts on all. One sum of 32 to 256 products was measured to be off by 2^-24 sqrt(n / 11).
    """
    return 2**-24 * (2 * head_dim / 11) ** 0.5


def check(case: Case, backend: str, *, factor: float = 2.0, **meaning) -> None:
    """Runs `backend` on a case and judges it beside eager attention; skips the test where it cannot run."""
    skip_unless_runs(backend, case.dtype, case.query.shape[-1], **meaning)
    scale = case.query.shape[-1] ** -0.5 if meaning.get("scale") is None else meaning["scale"]
    p = probabilities(case, **{**meaning, "scale": scale})
    exact = run(case, torch.float64, backend="eager", **meaning)
    eagers = errors(run(case, case.dtype, backend="eager", **meaning), exact)
    found = errors(run(case, case.dtype, backend=backend, **meaning), exact)
    floor = FLOOR[case.dtype] / 2
    floors = {name: Error(floor, max(floor, moved)) for name, moved in roundings(case, exact, p, scale).items()}
    if DEVICE.type == "cpu":
        sums = max(floor, two_sums(case.query.shape[-1]))
        floors |= {name: floors[name]._replace(rms=sums) for name in ("dq", "dk")}
    judge(found, eagers, floors, exponent_roundings(case, exact, p, scale), exact[1], factor)


def check_unrounded(rung: ModuleType, case: Case) -> None:
    """Checks that flash_v3's float32 output rounds to its output in the inputs' dtype, and that lse is the same."""
    asked = Asked(case.query.shape[-1] ** -0.5, is_causal=True)
    output, lse = rung.forward(*case.inputs(case.dtype), asked, output_dtype=torch.float32)
    rounded, same = rung.forward(*case.inputs(case.dtype), asked)
    assert output.dtype == torch.float32 and torch.equal(output.to(case.dtype), rounded), "not the same unrounded"
    assert torch.equal(lse, same), "not the same lse"
