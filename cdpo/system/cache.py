"""Numbers that runs share: a file for each key, computed by one process while the others wait, checked when read.

Knows nothing of models. A cache that is absent, damaged or cannot be written costs time, never a run or a number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cdpo.errors import DiskError
from cdpo.system.files import read_json, sweep, write_atomic
from cdpo.system.locks import alive, held, locked
from cdpo.system.progress import Heartbeat

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds without a sign of life, after which nobody waits any longer
Key = Mapping[str, Any]
OnBatch = Callable[[int], None]


class Silent(Exception):
    """Who holds the lock shows no sign of life; stays within this module."""


def once(
    folder: Path,
    key: Key,
    total: int,
    compute: Callable[[OnBatch], Tensor],
    fault: Callable[[Tensor], str],
    on_batch: OnBatch,
) -> tuple[Tensor, bool]:
    """The numbers of `key`, and whether they were computed here: else they were read, now or after a wait.

    `compute` tells its argument how many of `total` are done; while another process computes, `on_batch` is told how
    far that one is. `fault` says what is wrong with numbers that were read, "" if nothing; such ones are computed anew.
    Two processes compute one key only where the file system has no locks, or a holder hangs; the file stays whole.
    """
    file = _file(folder, key)
    place, found = file.parent, _sound(file, key, fault)[0]
    with ExitStack() as lock:
        if found is None:
            _hold(lock, place, on_batch)
            found, reason = _sound(file, key, fault)  # another process may have been faster
            if reason:
                log.warning("%s: %s; computed anew", file, reason)
        if found is not None:
            return found, False
        found = compute(_told(place, total, on_batch))
        keep(folder, key, found)
        return found, True


def look(folder: Path, key: Key, fault: Callable[[Tensor], str]) -> Tensor | None:
    """The numbers of `key` as `once` reads them, without a wait; None if there are none, or they are at fault."""
    found, reason = _sound(file := _file(folder, key), key, fault)
    if reason:
        log.warning("%s: %s; computed anew", file, reason)
    return found


def keep(folder: Path, key: Key, numbers: Tensor) -> None:
    """Leave numbers for other runs; a disk that takes none is a warning."""
    try:
        write(_file(folder, key), key, numbers)
    except DiskError as error:
        log.warning("not shared with other runs: %s", error)


def read(path: Path, key: Key) -> tuple[Tensor | None, str]:
    """The numbers of a file whose key holds all that `key` asks for, or None and why not ("" if there is no file)."""
    if not path.is_file():
        return None, ""
    try:
        with safe_open(path, "pt") as file:
            metadata, numbers = file.metadata() or {}, file.get_tensor("values")
        if metadata.get("sha256") != _digest(numbers.numpy().tobytes()):
            return None, "damaged: its sha256 is another"
        if not json.loads(metadata["key"]).items() >= key.items():
            return None, "of other tokens or of another model"
        return numbers, ""
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        return None, f"damaged: {error}"


def write(path: Path, key: Key, numbers: Tensor) -> None:
    """Keep numbers with their key and sha256. Raises DiskError."""
    metadata = {"key": json.dumps(key, sort_keys=True), "sha256": _digest(numbers.numpy().tobytes())}
    write_atomic(path, save({"values": numbers}, metadata))


def _file(folder: Path, key: Key) -> Path:
    return Path(folder) / _digest(json.dumps(key, sort_keys=True).encode())[:32] / "values.safetensors"


def _sound(file: Path, key: Key, fault: Callable[[Tensor], str]) -> tuple[Tensor | None, str]:
    found, reason = read(file, key)
    reason = fault(found) if found is not None else reason
    return (None, reason) if reason else (found, "")


def _hold(lock: ExitStack, place: Path, on_batch: OnBatch) -> None:
    """Lock the place, after whoever is at work there; go on without where that cannot be had."""
    seen = began = time.monotonic()

    def waiting() -> None:
        nonlocal seen
        now = time.monotonic()
        if seen == began:
            log.info("%s is computed by %s; waiting", place.parent.name, held(place))
        seen = now if alive(place) else max(seen, began + 1e-3)
        if now - seen > PATIENCE:
            raise Silent(f"{place}: no sign of life of {held(place)}")
        on_batch(_done(place))

    try:
        lock.enter_context(locked(place, "filled", waiting))
        sweep(place)
    except (DiskError, Silent) as error:
        log.warning("%s; computed here", error)


def _told(place: Path, total: int, on_batch: OnBatch) -> OnBatch:
    """`on_batch`, which tells other processes too."""
    heartbeat = Heartbeat(place / "progress.json", total, 0)

    def tell(done: int) -> None:
        with suppress(DiskError):
            heartbeat.beat(done)
        on_batch(done)

    return tell


def _done(place: Path) -> int:
    try:
        return int(read_json(place / "progress.json")["step"])
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun
        return 0


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
