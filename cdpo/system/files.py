"""The one writer of cdpo: whatever kills the process, a file is either the old one or the complete new one.

Knows nothing of what it writes. A file that cannot be written is a `DiskError`, and what stood there before is intact.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from cdpo.errors import DiskError

SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Make `path` hold `content`. Text is redacted, bytes are written as they are.

    Raises DiskError; then `path` is as it was before.
    """
    raw = redact(content).encode() if isinstance(content, str) else content
    with replacing(path, need=len(raw)) as draft, open(draft, "xb") as file:
        file.write(raw)


def write_json(path: Path, tree: Any) -> None:
    """Write `tree` as strict JSON (see `to_json`). Raises DiskError, and TypeError for what JSON cannot hold."""
    write_atomic(path, (to_json(tree, indent=2) + "\n").encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, which all have the keys of the first, under one line of names. Raises DiskError."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomic(path, text.getvalue())


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises FileNotFoundError, and ValueError naming a file that is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as fault:
        raise ValueError(f"{path}: not valid JSON ({fault})") from fault


def json_object(path: Path) -> tuple[dict[str, Any], str]:
    """The object in a JSON file, and what is wrong with one that cannot be read; {} and "" if there is no file."""
    try:
        tree = read_json(path)
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError) as fault:
        return {}, f"{path.name} cannot be read ({fault})"
    return (tree, "") if isinstance(tree, dict) else ({}, f"{path.name} holds no object")


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, without the lines that are none; nothing if it cannot be read."""
    raw = b""
    with suppress(OSError):
        raw = path.read_bytes()
    for line in raw.splitlines():
        row = None
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
        if isinstance(row, dict):
            yield row


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def to_json(tree: Any, indent: int | None = None) -> str:
    """Strict JSON of `tree`: secrets redacted; NaN and infinities, which JSON does not know, become null."""
    return json.dumps(_without(tree, cache(_secrets), finite=True), indent=indent, allow_nan=False)


def redact(tree: Any) -> Any:
    """`tree` (or a text) without the values of environment variables that are named like a key, token or password.

    Values shorter than 8 characters are left, they would hit ordinary words; so are the keys of a dict.
    """
    return _without(tree, cache(_secrets))  # a row of numbers never asks for them


def _secrets() -> list[str]:
    named = (os.environ.get(name, "") for name in os.environ if any(word in name.upper() for word in SECRET_NAMES))
    return sorted((value for value in named if len(value) >= 8), key=len, reverse=True)


def _without(tree: Any, hidden: Callable[[], list[str]], finite: bool = False) -> Any:
    """`tree` without secrets and, for JSON, without floats that are not finite."""
    if isinstance(tree, float):
        return tree if math.isfinite(tree) or not finite else None
    if isinstance(tree, str):
        for value in hidden():
            tree = tree.replace(value, "<redacted>")
        return tree
    if isinstance(tree, Mapping):
        return {key: _without(value, hidden, finite) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_without(value, hidden, finite) for value in tree]
    return tree


@contextmanager
def replacing(path: Path, need: int | None = None) -> Iterator[Path]:
    """A free temporary path beside `path`; the file or folder that the block makes there becomes `path` at its end.

    If the block raises, the draft is removed and `path` is as it was. `need` is the size in bytes, for the message.
    Raises DiskError for every OSError within.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with disk_errors(path, need):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            fsync(draft)
            os.replace(draft, path)
        except BaseException:
            remove(draft)
            raise
        fsync(path.parent)  # the rename itself


@contextmanager
def disk_errors(path: Path, need: int | None = None) -> Iterator[None]:
    """Turn an OSError of the block into a DiskError that says what to do about `path`; of nested ones the outermost."""
    try:
        yield
    except OSError as fault:
        cause = fault.__cause__ if isinstance(fault, DiskError) and isinstance(fault.__cause__, OSError) else fault
        raise DiskError(_explained(Path(path), cause, need)) from cause


def _explained(path: Path, fault: OSError, need: int | None) -> str:
    reason, advice = fault.strerror or str(fault), "check the disk"
    if fault.errno in _FULL:
        size = f"need {need:,} bytes, " if need is not None else ""
        reason, advice = f"disk full; {size}have {free_bytes(path):,}", "free some space"
    elif fault.errno in _FORBIDDEN:
        advice = "make its folder writable"
    return f"{path}: not written ({reason}); {advice} and run the same command again; what was saved before is intact"


def free_bytes(path: Path) -> int:
    """Bytes free for a file at `path`, which need not exist yet."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def require_space(path: Path, need: int) -> None:
    """Raises DiskError unless `need` bytes are free at `path`."""
    with disk_errors(path, need):
        if free_bytes(path) < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fsync(path: Path) -> None:
    """Force a file or a folder to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file or a folder as far as it can be deleted; never raises."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # a leftover, which `remove_drafts` takes next time
            path.unlink()


def remove_drafts(folder: Path) -> None:
    """Delete the drafts that killed writers left in `folder`. Only for who holds the folder's lock."""
    for leftover in Path(folder).glob(".*.tmp"):
        remove(leftover)
