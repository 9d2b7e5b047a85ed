"""Numbers that runs share: a file for each key, computed by one process while the others wait, checked when read.

    with entry.claimed(tell) as found:
        if found is None:
            found = entry.keep(compute(entry.telling(tell, total)))

Knows nothing of what the numbers are. A cache that is absent, damaged or cannot be written costs time, never a run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cdpo.errors import DiskError
from cdpo.system.files import read_json, remove_drafts, write_atomic
from cdpo.system.locks import alive, held, locked
from cdpo.system.progress import Heartbeat

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds without a sign of life, after which nobody waits any longer
Key = Mapping[str, Any]
Tell = Callable[[int], None]  # hears how many of the things to do are done, and may raise to interrupt
Fault = Callable[[Tensor], str]  # what is wrong with numbers that were read, "" if nothing


class Silent(Exception):
    """Who holds the lock shows no sign of life; stays within this module."""


def no_fault(numbers: Tensor) -> str:
    """Numbers whose key and sha256 are right need no other check."""
    return ""


@dataclass(frozen=True)
class Entry:
    """The place of one key's numbers in a folder that runs share."""

    folder: Path
    key: Key

    @property
    def place(self) -> Path:
        """The folder of this key alone: its file, its lock, its progress."""
        return Path(self.folder) / _sha256(json.dumps(self.key, sort_keys=True).encode())[:32]

    @property
    def file(self) -> Path:
        """Where the numbers are."""
        return self.place / "values.safetensors"

    @contextmanager
    def claimed(self, tell: Tell, fault: Fault = no_fault) -> Iterator[Tensor | None]:
        """The numbers; or None, and then the block computes them while other processes wait for it.

        While another process computes them, `tell` hears how far that one is. Numbers with a `fault` count as absent.
        Two processes compute one key only where the file system has no locks, or a holder hangs; the file stays whole.
        """
        with ExitStack() as lock:
            found = self._sound(fault)[0]
            if found is None:
                self._lock(lock, tell)
                found = self.read(fault)  # another process may have been faster
            yield found

    def read(self, fault: Fault = no_fault) -> Tensor | None:
        """The numbers, without a wait; None if there are none, or, with a warning, if they cannot be used."""
        found, reason = self._sound(fault)
        if reason:
            log.warning("%s: %s; computed anew", self.file, reason)
        return found

    def keep(self, numbers: Tensor) -> Tensor:
        """Leave numbers for other runs; a disk that takes none is a warning. Returns them."""
        try:
            write(self.file, self.key, numbers)
        except DiskError as error:
            log.warning("not shared with other runs: %s", error)
        return numbers

    def telling(self, tell: Tell, total: int) -> Tell:
        """`tell`, which lets the processes that wait know too how many of `total` are done."""
        heartbeat = Heartbeat(self.place / "progress.json", total, 0)

        def told(done: int) -> None:
            with suppress(DiskError):
                heartbeat.beat(done)
            tell(done)

        return told

    def _sound(self, fault: Fault) -> tuple[Tensor | None, str]:
        """Numbers without a fault, or None and why not."""
        found, reason = read(self.file, self.key)
        reason = fault(found) if found is not None else reason
        return (None, reason) if reason else (found, "")

    def _lock(self, lock: ExitStack, tell: Tell) -> None:
        """Lock the place, after whoever is at work there; go on without where that cannot be had."""
        seen = began = time.monotonic()

        def waiting() -> None:
            nonlocal seen
            now = time.monotonic()
            if seen == began:
                log.info("%s is computed by %s; waiting", self.folder.name, held(self.place))
            seen = now if alive(self.place) else max(seen, began + 1e-3)
            if now - seen > PATIENCE:
                raise Silent(f"{self.place}: no sign of life of {held(self.place)}")
            tell(self._done())

        try:
            lock.enter_context(locked(self.place, "filled", waiting))
            remove_drafts(self.place)
        except (DiskError, Silent) as error:
            log.warning("%s; computed here", error)

    def _done(self) -> int:
        """How many are done, by the process that computes them."""
        try:
            return int(read_json(self.place / "progress.json")["step"])
        except (OSError, ValueError, KeyError, TypeError):  # it has just begun
            return 0


def read(path: Path, key: Key) -> tuple[Tensor | None, str]:
    """The numbers of a file whose key holds all that `key` asks for, or None and why not ("" if there is no file)."""
    if not path.is_file():
        return None, ""
    try:
        with safe_open(path, "pt") as file:
            metadata, numbers = file.metadata() or {}, file.get_tensor("values")
        if metadata.get("sha256") != _sha256(numbers.numpy().tobytes()):
            return None, "damaged: its sha256 is another"
        if not json.loads(metadata["key"]).items() >= key.items():
            return None, "of other tokens or of another model"
        return numbers, ""
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        return None, f"damaged: {error}"


def write(path: Path, key: Key, numbers: Tensor) -> None:
    """Keep numbers with their key and sha256. Raises DiskError."""
    metadata = {"key": json.dumps(key, sort_keys=True), "sha256": _sha256(numbers.numpy().tobytes())}
    write_atomic(path, save({"values": numbers}, metadata))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
