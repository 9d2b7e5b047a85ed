"""Copies of the metrics for people to look at. A copy can neither stop nor slow a run; metrics.jsonl is the truth."""

from __future__ import annotations

import hashlib
import logging
import netrc
import os
import queue
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cdpo.system.files import read_json, redact, write_json

log = logging.getLogger(__name__)

WAITING = 10_000  # rows that may wait for wandb before it is given up


@dataclass
class NoLogger:
    """No copy: metrics.jsonl alone."""

    def start(self, folder: Path, config: Mapping[str, Any], group: str | None = None, after: int = -1) -> None:
        """Do nothing."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Do nothing."""

    def finish(self, exit_code: int = 0) -> None:
        """Do nothing."""


@dataclass
class Wandb:
    """A copy on Weights & Biases, written by its own thread; at its first failure it is dropped with one warning."""

    project: str = "cdpo"
    entity: str | None = None
    group: str | None = None
    job_type: str | None = "train"
    tags: list[str] = field(default_factory=list)
    mode: Literal["auto", "online", "offline"] = "auto"
    init_timeout: float = 20.0
    finish_timeout: float = 60.0

    def __post_init__(self) -> None:
        if min(self.init_timeout, self.finish_timeout) <= 0:
            raise ValueError("init_timeout and finish_timeout are seconds, greater than 0")
        self._waiting: queue.Queue[Mapping[str, Any] | int] = queue.Queue(WAITING)  # rows, at last an exit code
        self._thread: threading.Thread | None = None

    def start(self, folder: Path, config: Mapping[str, Any], group: str | None = None, after: int = -1) -> None:
        """Begin the copy of the run in `folder`, or go on with it; `group` is used where the setting is None.

        `after` is the last step that earlier attempts have logged (`MetricsFile.truncate` knows it): what a resumed
        run computes again is not copied again. Raises nothing, and does not wait.
        """
        arguments = (Path(folder).resolve(), redact(config), self.group or group, after)
        self._thread = threading.Thread(target=self._copy, args=arguments, name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Copy a row, which has a `step`. Raises nothing, and does not wait."""
        if self._thread is not None:
            self._put(redact(row))

    def finish(self, exit_code: int = 0) -> None:
        """End the copy; waits `finish_timeout` seconds at most. Raises nothing."""
        thread = self._thread
        if thread is not None:
            self._put(exit_code)
            self._thread = None
            thread.join(self.finish_timeout)
            if thread.is_alive():
                log.warning("wandb has not finished in %g s; its copy may be incomplete", self.finish_timeout)

    def _put(self, item: Mapping[str, Any] | int) -> None:
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            self._thread = None
            log.warning("wandb does not keep up and is dropped; metrics.jsonl goes on")

    def _copy(self, folder: Path, config: Mapping[str, Any], group: str | None, after: int) -> None:
        """The thread: every call of wandb is here, so that one `except` guards them all."""
        try:
            after = _copied(folder, after)
            run = self._begun(folder, config, group)
            while isinstance(row := self._waiting.get(), Mapping):
                numbers = {name: value for name, value in row.items() if name != "step" and value is not None}
                if row["step"] > after:
                    run.log(numbers, step=row["step"])
            run.finish(exit_code=row)
        except Exception as fault:
            self._thread = None
            log.warning("wandb is gone (%s); metrics.jsonl goes on", _named(fault))
            _torn_down()

    def _begun(self, folder: Path, config: Mapping[str, Any], group: str | None) -> Any:
        mode = _mode() if self.mode == "auto" else self.mode
        try:
            return self._init(mode, folder, config, group)
        except Exception as fault:
            if mode != "online":
                raise
            log.warning("wandb cannot go online (%s); it goes on offline, see `wandb sync`", _named(fault))
            _torn_down()
            return self._init("offline", folder, config, group)

    def _init(self, mode: Any, folder: Path, config: Mapping[str, Any], group: str | None) -> Any:
        # read when wandb is imported; its error reports would hold up the exit for half a minute without a network
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        settings = wandb.Settings(
            init_timeout=self.init_timeout,
            silent=True,  # its messages would break the progress bar
            console="off",
            disable_git=True,  # a remote's address and a command line (in meta) may hold a token
            disable_code=True,
            x_disable_meta=True,
            x_transaction_log_flush_interval=1.0,  # SIGTERM kills wandb's process: what waits is lost
        )
        if hasattr(settings, "finish_timeout"):  # also bounds wandb's own exit hook; not in every version
            settings.finish_timeout = self.finish_timeout
        return wandb.init(
            **redact({"project": self.project, "entity": self.entity, "job_type": self.job_type, "tags": self.tags}),
            group=redact(group),
            name=folder.name,
            id=run_id(folder),
            resume="allow",
            reinit="create_new",
            dir=folder,
            config=dict(config),
            mode=mode,
            settings=settings,
        )


def run_id(folder: Path) -> str:
    """The id of the run in `folder`: the same at every resume, another for another folder of that name."""
    folder = Path(folder).resolve()
    name = re.sub(r"[^A-Za-z0-9._-]", "-", folder.name)[:64]
    return f"{name}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}"


def _copied(folder: Path, after: int) -> int:
    """The last step that any earlier attempt may have copied, remembered in the run directory."""
    path = folder / "wandb" / "copied.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        after = max(after, read_json(path)["step"])
    write_json(path, {"step": after})
    return after


def _mode() -> str:
    """WANDB_MODE if it is set, online if there is a key, else offline."""
    found = os.environ.get("WANDB_API_KEY") or _in_netrc()
    return os.environ.get("WANDB_MODE") or ("online" if found else "offline")


def _in_netrc() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    return False


def _torn_down() -> None:
    """Forget a failed attempt: it holds the run's id in wandb's process, and its exit hook would print a traceback."""
    with suppress(Exception):
        import wandb

        wandb.teardown()


def _named(fault: Exception) -> str:
    text = str(redact(str(fault))).strip().splitlines()
    return f"{type(fault).__name__}: {text[0][:200]}" if text else type(fault).__name__
