"""The run directory: whether a run may go on there, what it was begun with, and how it ended.

Knows nothing of training. status.json is true at every moment but after a kill, when it says running.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from cdpo import __version__
from cdpo.config import read as config
from cdpo.errors import ConfigError, DiskError, Preempted, RankLost
from cdpo.system.checkpoint import latest_step
from cdpo.system.files import read_json, redact, remove, sha256, sweep, write_atomic, write_json
from cdpo.system.ranks import Ranks

log = logging.getLogger(__name__)

MICRO_BATCH = "micro_batch.json"  # tokens for which a GPU had room, when the run began


def begin(composed: dict[str, Any], folder: Path, files: dict[str, Any], command: str) -> dict[str, Any] | None:
    """The summary of a run that is finished; else write down what is about to run."""
    sweep(folder)
    _same_run(composed, folder)
    if _state(folder) in ("finished", "stopped_early"):
        return read_json(folder / "summary.json")  # type: ignore[no-any-return]
    if latest_step(folder / "checkpoints") < 0:  # nothing was trained: these may be other ones
        for name in ("reference.safetensors", MICRO_BATCH):
            remove(folder / name)
    for name, content in (files | {"inputs.json": _inputs(composed)}).items():
        write_json(folder / name, content)
    write_atomic(folder / "command.txt", command + "\n")
    return None


@contextmanager
def status(folder: Path, logger: Any, ranks: Ranks) -> Iterator[None]:
    """Keep status.json true: running, then how it ended and why (README); end the logger."""
    if not ranks.first:
        yield
        return
    where = {
        "cdpo": __version__,
        "torch": torch.__version__,
        "host": platform.node(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "ranks": ranks.size,
    }
    path = folder / "status.json"
    before = read_json(path) if path.is_file() else where
    if changed := [key for key, value in where.items() if before.get(key, 1) != value and key != "host"]:
        log.warning("%s changed since the last attempt: the run goes on, but not bit for bit", ", ".join(changed))
    write_json(path, {"state": "running", **where})
    try:
        yield
    except BaseException as error:
        states = {Preempted: "preempted", RankLost: "interrupted"}  # both go on when started again
        state = states.get(type(error), "failed")
        cause = f"{type(error).__name__}: {error}"
        with suppress(DiskError):  # a full disk must not hide why the run failed
            write_json(path, {"state": state, "cause": cause, **where})
        logger.finish(getattr(error, "exit_code", 1))
        raise
    logger.finish(0)
    write_json(path, {"state": read_json(folder / "summary.json")["state"], **where})


def _state(folder: Path) -> str | None:
    path = folder / "status.json"
    return read_json(path)["state"] if path.is_file() else None


def _inputs(composed: dict[str, Any]) -> dict[str, str]:
    """Size and sha256 of the local files that a run reads: data, world, and the model's folder."""
    named = [composed["dataset"].get(key) for key in ("path", "eval_path")] + [composed["model"].get("name_or_path")]
    paths = [Path(name) for name in named if name]
    files = [
        file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*"))) if file.is_file()
    ]
    return {str(file): _print(file) for file in files}


def _print(file: Path) -> str:
    """Large files, which weights are, by size alone: before training the step-0 check looks at what they do."""
    size = file.stat().st_size
    return f"{size} bytes" + (f", sha256 {sha256(file)}" if size < 1 << 30 else "")


def _same_run(composed: dict[str, Any], folder: Path) -> None:
    """ConfigError if `folder` holds a run of another config or of other files; names the key, or the file."""
    path = folder / "config.json"
    if not path.is_file() or _failed_at_once(folder):
        return
    old, new = config.trajectory(read_json(path)), config.trajectory(redact(composed))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{folder} holds a run with {key}={old.get(key)!r}, now it is {new.get(key)!r}: "
                "choose another name, or go back to the old value"
            )
    before, now = (read_json(folder / "inputs.json") if (folder / "inputs.json").is_file() else {}), _inputs(composed)
    if changed := sorted(file for file in before.keys() | now.keys() if before and before.get(file) != now.get(file)):
        raise ConfigError(f"{folder} holds a run of other files: {', '.join(changed)} changed; choose another name")


def _failed_at_once(folder: Path) -> bool:
    """Whether the earlier attempt failed before it wrote a number that those of another config could be mixed with."""
    measured = folder / "metrics.jsonl"
    begun = latest_step(folder / "checkpoints") >= 0 or (measured.is_file() and measured.stat().st_size > 0)
    return _state(folder) == "failed" and not begun
