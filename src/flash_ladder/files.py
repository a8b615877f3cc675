"""Files and folders that are whole or not there at all, and what is wrong with those that are not."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import EACCES, EISDIR
from pathlib import Path
from typing import Any

import yaml  # Hydra's
from filelock import FileLock, Timeout

from flash_ladder.errors import UserError, argument, first_line

YAML_BYTES = 1 << 20  # a file of ours has a few thousand
DIGEST = "digest"  # key of a sealed object

LOCK = ".lock"  # in the folder of a run: locked for as long as a process trains there
LEASE_SECONDS = 180  # how long a lock of a machine that is gone may last: NFS 4 gives it up after 90


def make_writable(folder: Path, what: str, key: str) -> None:
    """Makes `folder`. Raises UserError where it cannot be made or written; the message calls it `what` and names the `key`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "permission denied"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise UserError(f"{what} {folder} cannot be written ({reason}); set {key}=PATH")


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Makes `folder` this process's own until the block ends, or the process, however it dies.

    Raises UserError where another process owns it, and where it cannot be written.
    """
    lock = FileLock(folder / LOCK)
    # A network file system keeps the lock of a node that failed for a while, when SLURM has queued its job again.
    patience = LEASE_SECONDS if int(os.environ.get("SLURM_RESTART_COUNT", "0")) else 0
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise UserError(
            f"{folder} is another process's, which still runs (fuser {folder / LOCK} names it); wait for its end, or end it"
        ) from None
    except OSError as error:
        raise UserError(f"{folder / LOCK} cannot be written ({error.strerror}); a run locks its folder") from None
    try:
        yield
    finally:
        lock.release()


def refuse_taken(run_dir: Path) -> None:
    """Raises UserError where `run_dir` holds a run, which a new one would destroy."""
    there = [name for name in ("config.yaml", "metrics.jsonl", "train.log", "checkpoints") if (run_dir / name).exists()]
    if there:
        goes_on = argument("resume", run_dir)
        raise UserError(
            f"{run_dir} holds a run already ({there[0]}); hydra.run.dir=PATH names another folder, and {goes_on} goes on"
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
    if not out.name:
        raise UserError(f"out={out} cannot be replaced; name a folder below it")
    new, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    if old.is_dir() and not out.exists():  # killed between the two renames below
        old.rename(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file; name a folder")
    strange = sorted({p.name for p in out.iterdir()} - {*names}) if out.exists() else []
    if strange:
        raise UserError(
            f"out={out} would be replaced, and holds other files than this command's ({strange[0]}); name another folder"
        )
    try:
        for folder in (new, old):
            if folder.exists():
                shutil.rmtree(folder)
        new.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error.strerror}); name another folder") from None
    try:
        yield new
        for file in new.rglob("*"):
            sync(file)
        sync(new)
        if out.exists():
            out.rename(old)
        new.rename(out)
        sync(out.parent)
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error.strerror}); what was there before is kept") from error
    finally:
        if old.is_dir() and not out.exists():
            old.rename(out)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def json_of(text: str | bytes) -> Any:
    """What JSON says. Raises ValueError where it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """Raises UserError where `path` is missing or is not JSON."""
    try:
        return json_of(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; copy it again, or have it written again") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); copy it again, or have it written again") from None


def read_text(path: Path, key: str) -> str:
    """A text file as its bytes are, line ends included. Raises UserError, which names the `key`, where it is missing or no text."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{key}={path} cannot be read ({error.strerror}); name a text file") from None
    except UnicodeDecodeError:
        raise UserError(f"{key}={path} is not text (its bytes are not UTF-8)") from None


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


def check_file(path: Path, key: str) -> None:
    """Raises UserError where `path`, which `key` names, cannot become a file: said before there is something to write."""
    folder = path.absolute().parent
    if os.path.isdir(path):
        raise UserError(f"{key}={path} is a folder; name a file")
    if not os.path.isdir(folder):
        raise UserError(f"{key}={path} cannot be written: there is no folder {path.parent}; make it, or name another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{key}={path} cannot be written (permission denied); name a file elsewhere")


def write_json(path: Path, value: Any, sealed: bool = False) -> None:
    """Writes `value` to `path`, all of it or nothing; nan and inf, which JSON lacks, become null. Raises UserError.

    sealed: an object gets a digest of its content, which `is_sealed` checks.
    """
    value = _finite(value)
    if sealed:
        value = value | {DIGEST: _content_digest(value)}
    try:
        replace_files({path: as_json(value)})
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another file") from None


def as_json(value: Any) -> str:
    """`value` as the text of a JSON file; nan and inf, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n"


def as_yaml(value: Any) -> str:
    """Plain values as the text of a YAML file. A ${ in a text is text, which OmegaConf's own writer would try to follow."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def refuse_unwritable(path: Path) -> None:
    """Raises OSError where a file is there that may not be written, or a folder."""
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        code = EISDIR if path.is_dir() else EACCES
        raise OSError(code, os.strerror(code), str(path))


def replace_files(contents: Mapping[Path, str | bytes]) -> None:
    """Writes every file with its content, in place of what is there. All are on the disk before the first takes its name.

    Raises OSError, whose filename is the file, where one cannot be written; then all are as they were.
    """
    saving = {path: path.with_name(f".{path.name}.saving") for path in contents}
    path = Path()
    try:
        for path in contents:
            refuse_unwritable(path)
        for path, content in contents.items():
            saving[path].write_bytes(content if isinstance(content, bytes) else content.encode())
            sync(saving[path])
        for path in contents:
            os.replace(saving[path], path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        for left_over in saving.values():
            with suppress(OSError):
                left_over.unlink()


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
