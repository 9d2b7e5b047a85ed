"""One run, one process: an exclusive lock on a directory, with a sign of life of who holds it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cdpo.errors import ConfigError
from cdpo.system.files import disk_errors, read_json, write_json


@contextmanager
def locked(folder: Path, doing: str = "trained", waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold `folder` for this process, which is `doing` something with it.

    Raises ConfigError naming who holds it already; with `waiting` it waits for that one instead, and calls `waiting`
    twice a second, which may raise to give up. Raises DiskError if `folder` is not writable. The system drops the lock
    when the process dies, however it dies; a forked child that lives on keeps it. On NFS it holds across hosts only
    where the server passes flock on (Linux NFSv4 does; `local_lock` and `nolock` do not).
    """
    folder = Path(folder)
    lock, ended = FileLock(folder / ".lock", timeout=0), threading.Event()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire()
            except Timeout:
                if waiting is None:
                    advice = "wait for it or stop it, or choose another run directory"
                    raise ConfigError(f"{folder} is being {doing} by {held(folder)}; {advice}") from None
                waiting()
                time.sleep(0.5)
    try:
        write_json(folder / "lock.json", _holder())
        threading.Thread(target=_live, args=(folder / "lock.json", ended), daemon=True).start()
        yield
    finally:
        ended.set()
        lock.release()


def alive(folder: Path) -> bool:
    """Whether the holder of a directory shows signs of life; a process of this host is asked itself."""
    try:
        holder, seen = read_json(folder / "lock.json"), (folder / "lock.json").stat().st_mtime
        if holder["host"] == socket.gethostname():
            os.kill(holder["pid"], 0)
        return time.time() - seen < 90
    except PermissionError:  # it is there, and another user's
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _live(path: Path, ended: threading.Event) -> None:
    """Touch the file every half minute."""
    while not ended.wait(30):
        with suppress(OSError):
            os.utime(path)


def _holder() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def held(folder: Path) -> str:
    """Who holds a directory, for messages."""
    try:
        holder = read_json(folder / "lock.json")
        job = f" (SLURM job {holder['job']})" if holder["job"] else ""
        silent = time.time() - (folder / "lock.json").stat().st_mtime
        who = f"pid {holder['pid']} on host {holder['host']}{job}"
        return f"{who} since {holder['since']}, last sign of life {silent:.0f} s ago"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock, but has not said yet who it is
        return "another process"
