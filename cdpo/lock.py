"""One run, one process: an exclusive lock on a run directory."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cdpo.errors import ConfigError
from cdpo.files import disk_errors, read_json, write_json


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process. Raises ConfigError naming who holds it already, DiskError if it is not writable.

    The system drops the lock when the process dies, however it dies; a forked child that lives on keeps it. On NFS
    it holds across hosts only where the server passes flock on (Linux NFSv4 does; `local_lock` and `nolock` do not).
    """
    folder = Path(folder)
    lock = FileLock(folder / ".lock", timeout=0)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            advice = "wait for it or stop it, or choose another run directory"
            raise ConfigError(f"{folder} {_held(folder)}; {advice}") from None
    try:
        write_json(folder / "lock.json", _holder())
        yield
    finally:
        lock.release()


def _holder() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _held(folder: Path) -> str:
    try:
        holder = read_json(folder / "lock.json")
        job = f" (SLURM job {holder['job']})" if holder["job"] else ""
        return f"is being trained by pid {holder['pid']} on host {holder['host']}{job} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock, but has not said yet who it is
        return "is being trained by another process"
