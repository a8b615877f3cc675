"""What scripts/certify.py does: loads a model and a text, measures, and writes the certificate."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from flash_ladder.certify.causal_lm import TRUSTED, CausalLM, describe_reference, implementation, load
from flash_ladder.certify.certificate import Certificate, certify
from flash_ladder.certify.picture import draw_certificate
from flash_ladder.errors import UserError
from flash_ladder.export.verdict import align, describe_windows, loss_rows, report, verdict
from flash_ladder.files import read_text, replace_folder, write_json
from flash_ladder.kernels.generations import describe, dtype_name
from flash_ladder.kernels.jit import installed
from flash_ladder.machine.decide import pick_device
from flash_ladder.machine.hardware import versions
from flash_ladder.model.loss import perplexity
from flash_ladder.script_schema import CertifyConfig

NAME = "certificate"
FILES = tuple(f"{NAME}.{kind}" for kind in ("json", "md", "png", "svg"))
LONGEST = 1024  # tokens of a window where the user names no length


def certify_model(cfg: CertifyConfig) -> int:
    """Certifies a model, prints the figures and writes the folder cfg.out; returns 1 where a figure is beyond its limit.

    Raises UserError where the model or the text cannot be read, and where an implementation cannot run here.
    """
    device = pick_device(cfg.device)
    path = Path(argparse.__file__ if cfg.text is None else cfg.text)  # of the text, which every Python has
    text = read_text(path, "text")
    lm = load(cast("str", cfg.model), cfg.dtype, device)  # validate() refuses a missing one
    a, b = implementation("a", cfg.a, lm.model), implementation("b", cfg.b, lm.model)
    tokens = text_windows(lm, path, text, cfg)
    for key, one in (("a", a), ("b", b)):
        print(f"{key}: {one.label}, {one.reason or 'as transformers has it'}")
    print(f"reference: {describe_reference(lm)}")
    size = describe_windows({"tokens": tokens})
    print(f"text: {path}, {size}, {dtype_name(lm.dtype)}, {describe(lm.device)}")
    with replace_folder(Path(cfg.out), FILES) as folder:
        certificate = certify(lm, tokens, a, b, cfg.tokens)
        where = f"{Path(lm.name).name} in {dtype_name(lm.dtype)} · {describe(lm.device)} · {size} of {path.name}"
        about = {
            **{key: {"name": one.label, "in_transformers": one.key, "reason": one.reason} for key, one in (("a", a), ("b", b))},
            "model": lm.name,
            "class": type(lm.model).__name__,
            "dtype": dtype_name(lm.dtype),
            "device": describe(lm.device),
            "reference": describe_reference(lm),
            "text": {"name": path.name, "sha256": hashlib.sha256(text.encode()).hexdigest()},
            "versions": versions() | {"transformers": installed("transformers")},
        }
        write_json(folder / f"{NAME}.json", record(certificate) | about)
        (folder / f"{NAME}.md").write_text(card(certificate, about), encoding="utf-8")
        draw_certificate(certificate, where, folder / f"{NAME}.png")
    print("\n" + align(error_rows(certificate)) + "\n")
    print(*told(certificate), sep="\n")
    verdict_and_place = f"{words(certificate, lm.dtype)}\nwritten to {cfg.out}"
    return report(losses(certificate), certificate.checks(), f"{a.label} against {b.label}", verdict_and_place)


def text_windows(lm: CausalLM, path: Path, text: str, cfg: CertifyConfig) -> torch.Tensor:
    """The first windows of a text, int64 [N, S + 1], each beginning with the last token of the one before.

    Raises UserError where the text has not one window, and for windows longer than the model takes.
    """
    longest = lm.longest
    if cfg.seq_len is not None and longest is not None and cfg.seq_len > longest:
        raise UserError(
            f"seq_len={cfg.seq_len} is more than the {longest} positions of model={lm.name}; seq_len={longest} would work"
        )
    seq_len = cfg.seq_len or min(LONGEST, longest or LONGEST)
    ids = lm.encode(text)
    if len(ids) <= seq_len:
        hint = f"; seq_len={len(ids) - 1} would work" if len(ids) > 1 else ""
        raise UserError(f"text={path} is {len(ids)} tokens long, and one window of {seq_len} needs {seq_len + 1}{hint}")
    return torch.tensor(ids[: cfg.windows * seq_len + 1]).unfold(0, seq_len + 1, seq_len)


# ---- the result in words and tables ----


def words(certificate: Certificate, dtype: torch.dtype) -> str:
    """The verdict in a sentence or two."""
    pair, name = f"{certificate.a} and {certificate.b}", dtype_name(dtype)
    if not certificate.within:
        return f"NOT certified: {pair} differ by more than rounding in {name} does to this model"
    said = f"certified: {pair} make the same model, to what rounding in {name} does to it"
    if dtype.itemsize < 4:
        said += f". In {name} that hides small faults, such as a scale off by 1 %: dtype=float32 sees those"
    return said


def told(certificate: Certificate) -> list[str]:
    """What the limits come from, and how far two greedy continuations go together, each in a line."""
    eager, parting = certificate.runs[TRUSTED], certificate.parting
    lines = [
        f"rounding: mean KL {certificate.rounding:.2e}, the larger of eager's error ({eager.mean_kl:.2e}) and the noise "
        f"floor, eager in batches of two ({certificate.noise:.2e})"
    ]
    if parting is not None:
        n = f"all {parting.n_tokens:,}" if parting.at is None else f"{parting.at:,}"
        at = "" if parting.at is None else f"; there one takes a token {parting.gap:.2e} under float64's best"
        lines.append(f"greedy continuations: the same for {n} tokens{at}")
    return lines


def losses(certificate: Certificate) -> dict[str, float]:
    """The loss of the float64 forward and of each implementation, by label."""
    return {"float64": certificate.exact_loss, **{label: run.loss for label, run in certificate.runs.items()}}


def error_rows(certificate: Certificate) -> list[list[str]]:
    """Each implementation's error against float64, as a table's rows, and what is told beside it."""
    runs = certificate.runs
    return [
        ["error against float64", *runs],
        ["mean KL (nats per token)", *(f"{run.mean_kl:.2e}" for run in runs.values())],
        ["max |Δ logit|", *(f"{run.max_logit_difference:.2e}" for run in runs.values())],
        ["mean |Δ logit|", *(f"{run.mean_logit_difference:.2e}" for run in runs.values())],
        ["equal greedy tokens", *(f"{run.agreement:.3%}" for run in runs.values())],
        [f"of the clear ones ({certificate.clear_share:.0%})", *(f"{run.clear_agreement:.3%}" for run in runs.values())],
    ]


def record(certificate: Certificate) -> dict[str, Any]:
    """The certificate as plain data for a JSON file."""
    found = asdict(certificate) | verdict(certificate.checks())
    return found | {"perplexity": {label: perplexity(loss) for label, loss in losses(certificate).items()}}


def card(certificate: Certificate, about: dict[str, Any]) -> str:
    """The certificate as Markdown, for a model card."""
    rows = loss_rows(losses(certificate)) + [[row[0], "", *row[1:]] for row in error_rows(certificate)[1:]]
    checks = [["check", "figure", "limit", ""]]
    checks += [[check.name, *check.words, "ok" if check.within else "**beyond**"] for check in certificate.checks()]
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "transformers"))
    size = f"{certificate.n_windows} windows of {certificate.seq_len} tokens of {about['text']['name']}"
    said = words(certificate, getattr(torch, about["dtype"]))
    return "\n".join(
        [
            f"### Attention: {certificate.a} against {certificate.b}",
            "",
            f"{said[0].upper()}{said[1:]}.",
            "",
            *table(rows),
            "",
            *table(checks),
            "",
            *(f"- {line}" for line in told(certificate)),
            *(f"- {about[key]['name']}: {about[key]['reason']}" for key in "ab" if about[key]["reason"]),
            f"- errors: against {about['reference']}",
            f"- {size}; {about['dtype']}, {about['device']}; {versions}",
            "",
        ]
    )


def table(rows: list[list[str]]) -> list[str]:
    """Rows as lines of a Markdown table."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]
