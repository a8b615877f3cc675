"""Files and folders that are whole or not there at all, and what is wrong with those that are not."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml  # Hydra's

from flash_ladder.errors import UserError, first_line

YAML_BYTES = 1 << 20  # a file of ours has a few thousand
DIGEST = "digest"  # key of a sealed object


def make_writable(folder: Path, what: str, key: str) -> None:
    """Makes `folder`. Raises UserError where it cannot be made or written; the message calls it `what` and names the `key`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "permission denied"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise UserError(f"{what} {folder} cannot be written ({reason}); set {key}=PATH")


def refuse_taken(run_dir: Path) -> None:
    """Raises UserError where `run_dir` holds a run, which a new one would destroy."""
    there = [name for name in ("config.yaml", "metrics.jsonl", "train.log", "checkpoints") if (run_dir / name).exists()]
    if there:
        raise UserError(
            f"{run_dir} holds a run already ({there[0]}); hydra.run.dir=PATH names another folder, and resume={run_dir} goes on"
        )


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replace_folder(out: Path, names: Collection[str]) -> Iterator[Path]:
    """Yields a new folder beside `out`, which takes the place of `out` when the block is done and everything is on the disk.

    Until then, and after an error, a folder that is already there stays as it is. Raises UserError where that folder holds other
    files than `names`, which would be lost, and where `out` cannot be written.
    """
    out = out.absolute()
    new, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    if old.is_dir() and not out.exists():  # killed between the two renames below
        old.rename(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file; name a folder")
    strange = sorted({p.name for p in out.iterdir()} - {*names}) if out.exists() else []
    if strange:
        raise UserError(f"out={out} would be replaced, and holds other files than an export's ({strange[0]}); name another folder")
    try:
        for folder in (new, old):
            if folder.exists():
                shutil.rmtree(folder)
        new.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error.strerror}); name another folder") from None
    try:
        yield new
        for file in new.iterdir():
            sync(file)
        sync(new)
        if out.exists():
            out.rename(old)
        new.rename(out)
        sync(out.parent)
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error.strerror}); an export that was there before is kept") from error
    finally:
        if old.is_dir() and not out.exists():
            old.rename(out)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def read_json(path: Path) -> Any:
    """Raises UserError where `path` is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; copy it again, or have it written again") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); copy it again, or have it written again") from None


def plain_yaml(path: Path) -> Any:
    """A YAML file that train.py or Hydra wrote into a run's folder, as plain values: references (${...}) stay text.

    Raises OSError or ValueError where it cannot be read, is much larger than such a file, or holds an alias.
    """
    if path.stat().st_size > YAML_BYTES:
        raise ValueError(f"it is larger than {YAML_BYTES >> 20} MiB")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _NoAliases)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _NoAliases(yaml.SafeLoader):
    """Refuses aliases, which no file of ours has: a few lines of nested ones stand for more values than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias, which no such file has")
        return super().compose_node(parent, index)


def write_json(path: Path, value: Any, sealed: bool = False) -> None:
    """Writes `value` to `path`, all of it or nothing; nan and inf, which JSON lacks, become null. Raises UserError.

    sealed: an object gets a digest of its content, which `is_sealed` checks.
    """
    value = _finite(value)
    if sealed:
        value = value | {DIGEST: _content_digest(value)}
    saving = path.with_name(f".{path.name}.saving")
    try:
        saving.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        sync(saving)
        os.replace(saving, path)
    except OSError as error:
        saving.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror}); name another file") from None


def is_sealed(value: dict[str, Any]) -> bool:
    """Whether an object from a JSON file is what `write_json` sealed."""
    return value.get(DIGEST) == _content_digest(value)


def _content_digest(value: dict[str, Any]) -> str:
    content = json.dumps({key: v for key, v in value.items() if key != DIGEST}, sort_keys=True)
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def checksum(path: Path, algorithm: Callable[[], Any] = hashlib.sha256) -> str:
    """The digest of a file, in hex: SHA-256, or of another algorithm with hashlib's interface."""
    digest = algorithm()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
