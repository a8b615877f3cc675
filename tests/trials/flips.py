"""Flipped bits in files that a command reads again: `python tests/trials/flips.py n=200 seed=0`.

A bit of a checkpoint, of the data cache or of an exported folder is flipped, and the command that reads it runs: train.py with
resume=, train.py, scripts/evaluate.py or scripts/generate.py. It must refuse the file with one line, or come to the same numbers.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: it has a folder `kernels`, which is a library's name too
from tests.trials import forks  # first: it sets the environment

# isort: split
from flash_ladder.export import folder as export_folder
from tests.helpers.tiny import overrides, tiny_config

HALF, STEPS = 4, 8  # the steps of the checkpoint, and of the run that goes on from it
SAME, REFUSED = "same numbers", "refused"


@dataclass(frozen=True)
class Kind:
    """What is flipped, and what reads it."""

    files: str  # a pattern below the prepared folder
    script: str
    arguments: list[str]  # relative to that folder
    numbers: str  # the file that has the numbers; "said" for what the command says


def kinds(folder: Path) -> dict[str, Kind]:
    """Every kind of file that is flipped."""
    new = [*overrides(tiny_config(folder, max_steps=STEPS, val_every=HALF)), "hydra.run.dir=new"]
    found = {
        "last.ckpt": Kind(
            "run/checkpoints/last.ckpt", "train.py", ["resume=run", f"trainer.max_steps={STEPS}"], "run/metrics.jsonl"
        ),
        "cache: tokens": Kind("cache/*/tokens*.arrow", "train.py", new, "new/metrics.jsonl"),
        "cache: tokenizer": Kind("cache/*/tokenizer.json", "train.py", new, "new/metrics.jsonl"),
        "cache: corpus.json": Kind("cache/*/corpus.json", "train.py", new, "new/metrics.jsonl"),
        "best.ckpt, exported": Kind("run/checkpoints/best.ckpt", "scripts/export.py", ["run=run", "out=out"], "out/parity.json"),
    }
    for name in export_folder.FILES:
        file = f"run/export/{name}"
        evaluated = ["model=run/export", "out=result.json", "against=eager"]
        found[f"evaluate: {name}"] = Kind(file, "scripts/evaluate.py", evaluated, "result.json")
        generated = ["model=run/export", "max_new_tokens=8", "seed=1"]
        found[f"generate: {name}"] = Kind(file, "scripts/generate.py", generated, "said")
    return found


def numbers(path: Path) -> object:
    """What a command came to, without times and places."""
    if path.suffix == ".jsonl":
        rows = map(json.loads, path.read_text().splitlines())
        return [(row["step"], name, row[name]) for row in rows for name in ("train/loss", "val/loss") if name in row]
    if path.suffix == ".json":
        return {key: value for key, value in json.loads(path.read_text()).items() if key != "versions"}
    return path.read_text()


def flipped(path: Path, draw: random.Random) -> str:
    """Flips a bit of a file, half of the time in its last tenth, where a checkpoint's directory is; returns which."""
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content) * 9 // 10 if draw.random() < 0.5 else 0, len(content))
    bit = draw.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"byte {at} of {len(content)}, bit {bit}"


def tried(drawn: tuple[str, str, Kind, Path, object]) -> tuple[str, str, str]:
    """Flips a bit in a copy of the prepared folder and runs the command: the kind, what became of it, and words if it is bad."""
    seed, name, kind, prepared, expected = drawn
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "folder"
        shutil.copytree(prepared, folder)
        where = flipped(draw.choice(sorted(folder.glob(kind.files))), draw)
        arguments = [argument.replace(str(prepared), str(folder)) for argument in kind.arguments]
        end = forks.forked(kind.script, arguments, folder)
        bad = [*end.faults()]
        if end.refused():
            became = REFUSED
        elif end.code == 0:
            became = SAME
            if numbers(folder / kind.numbers) != expected:
                bad.append("other numbers")
        else:
            became = f"exit code {end.code}"
            bad.append(became)
        return name, "wrong" if bad else became, f"{name} ({where}): {'; '.join(bad)}: {' | '.join(end.lines[-3:])}" if bad else ""


def prepare(folder: Path) -> dict[str, tuple[Kind, object]]:
    """Makes a run of HALF steps, its cache and its export in `folder`; returns every kind with the numbers that it comes to."""
    given = overrides(tiny_config(folder, max_steps=HALF, val_every=HALF))
    for script, arguments in (("train.py", [*given, "hydra.run.dir=run"]), ("scripts/export.py", ["run=run"])):
        end = forks.forked(script, arguments, folder)
        assert end.code == 0, end.said
    expected = {}
    for name, kind in kinds(folder).items():
        with tempfile.TemporaryDirectory() as temporary:
            copy = Path(temporary) / "folder"
            shutil.copytree(folder, copy)
            end = forks.forked(kind.script, [a.replace(str(folder), str(copy)) for a in kind.arguments], copy)
            assert end.code == 0, end.said
            expected[name] = kind, numbers(copy / kind.numbers)
    return expected


def main(n: int, seed: int, show: Callable[[str], None] = print) -> int:
    """Flips `n` bits, each in a file of its own, and says what became of them; returns how many went wrong."""
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        prepared = Path(temporary)
        expected = prepare(prepared)
        names = [name for name in expected for _ in range(3 if name.startswith(("last", "cache")) else 1)]
        drawn = []
        for i in range(n):
            name = names[i % len(names)]
            drawn.append((f"{seed}/{i}", name, expected[name][0], prepared, expected[name][1]))
        with get_context("fork").Pool(2) as pool:
            for name, became, words in pool.imap_unordered(tried, drawn, chunksize=1):
                counts[name, became] += 1
                if words:
                    show(words)
    columns = (REFUSED, SAME, "wrong")
    show(f"{'':32}" + "".join(f"{column:>14}" for column in columns))
    for name in expected:
        show(f"{name:32}" + "".join(f"{counts[name, column]:14}" for column in columns))
    wrong = sum(count for (_, became), count in counts.items() if became == "wrong")
    show(f"{n} flipped bits (seed {seed}), {wrong} wrong")
    return wrong


if __name__ == "__main__":
    values = {"n": 200, "seed": 0} | {key: int(value) for key, _, value in (argument.partition("=") for argument in sys.argv[1:])}
    sys.exit(1 if main(**values) else 0)
