"""The run directory: the names of its files, what they say of the run, and whether a run may begin or go on there.

The only place that spells these names. status.json is true at every moment but after a kill, when it says running.
Knows nothing of training, and imports no torch before a run begins: cdpo-status answers at once.
"""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpo import __version__
from cdpo.config.identity import trajectory
from cdpo.config.task import Task
from cdpo.errors import ConfigError, DiskError, Preempted, RankLost
from cdpo.system.files import json_object, read_json, redact, remove, remove_drafts, sha256, write_atomic, write_json

log = logging.getLogger(__name__)

DONE = ("finished", "stopped_early")  # states in which nothing is left to do
SIZE_ONLY = 1 << 30  # bytes; of larger files only the size is remembered


class _File:
    """A file of the run directory, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, directory: RunDirectory, owner: type | None = None) -> Path:
        return directory.path / self.name


@dataclass(frozen=True)
class RunDirectory:
    """What lies where in the directory of a run."""

    path: Path

    config = _File("config.json")
    choices = _File("choices.json")
    inputs = _File("inputs.json")
    command = _File("command.txt")
    status = _File("status.json")
    progress = _File("progress.json")
    metrics = _File("metrics.jsonl")
    histograms = _File("histograms.jsonl")
    samples = _File("samples.jsonl")
    objective = _File("objective.csv")
    candidates = _File("candidates.csv")  # the policy itself, on each prompt's candidates
    searches = _File("searches.csv")  # what every start of optimizer=exact came to
    solution = _File("solution.safetensors")  # the change that it found
    starts = _File("starts.safetensors")  # optima of other runs, to begin from too
    nonfinite = _File("nonfinite.json")
    data_report = _File("data_report.json")
    micro_batch = _File("micro_batch.json")  # tokens for which a GPU had room, when the run began
    reference = _File("reference.safetensors")
    checkpoints = _File("checkpoints")
    model = _File("model")
    summary = _File("summary.json")
    train_log = _File("train.log")
    output_log = _File("output.log")

    # ------------------------------------------------------------------------------------------------- what it says

    def state(self) -> str | None:
        """running, finished, stopped_early, preempted, interrupted or failed; None where no run has begun."""
        return json_object(self.status)[0].get("state")

    def done(self) -> bool:
        """Whether the run went through."""
        return self.state() in DONE

    def holds_run(self, names: Collection[str]) -> bool:
        """Whether a run was begun here, by the names of the files that lie here.

        A model's folder has a config.json too. One that cannot be read is taken for a run's, so that it is listed.
        """
        if self.status.name in names or self.config.name not in names:
            return self.status.name in names
        try:
            tree = read_json(self.config)
        except (OSError, ValueError):
            return True
        return isinstance(tree, dict) and "trainer" in tree

    def step(self) -> int:
        """The step of the newest checkpoint, whole or not; -1 if there is none."""
        from cdpo.system.checkpoint import latest_step  # with torch

        return latest_step(self.checkpoints)

    # ------------------------------------------------------------------------------------------------- a run begins

    def begin(self, task: Task) -> dict[str, Any] | None:
        """The summary of a run that is finished; else write down what is about to run.

        Raises ConfigError where the directory holds another run, DiskError. Only for who holds its lock.
        """
        remove_drafts(self.path)
        inputs = inputs_of(task.composed)
        self._check_same(task.composed, inputs)
        if self.done():
            return read_json(self.summary)  # type: ignore[no-any-return]
        if self.step() < 0:  # nothing was trained: these may be other ones
            remove(self.reference)
            remove(self.micro_batch)
        write_json(self.config, task.composed)
        write_json(self.choices, task.choices)
        write_json(self.inputs, inputs)
        write_atomic(self.command, task.command + "\n")
        return None

    @contextmanager
    def running(self, machine: dict[str, Any]) -> Iterator[None]:
        """Keep status.json true while the block runs: running, then how it ended and why (docs/run_directory.md)."""
        where = {"cdpo": __version__, "host": platform.node(), **machine}
        before = json_object(self.status)[0] or where
        if changed := [key for key, value in where.items() if before.get(key, 1) != value and key != "host"]:
            log.warning("%s changed since the last attempt: the run goes on, but not bit for bit", ", ".join(changed))
        write_json(self.status, {"state": "running", **where})
        try:
            yield
        except BaseException as error:
            states = {Preempted: "preempted", RankLost: "interrupted"}  # both go on when started again
            state = states.get(type(error), "failed")
            with suppress(DiskError):  # a full disk must not hide why the run failed
                write_json(self.status, {"state": state, "cause": f"{type(error).__name__}: {error}", **where})
            raise
        write_json(self.status, {"state": read_json(self.summary)["state"], **where})

    def remove_if_bare(self) -> bool:
        """Remove a directory in which nothing was begun; returns whether it was one."""
        logs = {self.train_log.name, self.output_log.name}
        bare = self.path.is_dir() and {path.name for path in self.path.iterdir()} <= logs
        if bare:
            shutil.rmtree(self.path)
        return bare

    def _check_same(self, composed: dict[str, Any], inputs: dict[str, str]) -> None:
        """ConfigError if the directory holds a run of another config or of other files; names the key, or the file."""
        if not self.config.is_file() or self._failed_at_once():
            return
        old, new = trajectory(read_json(self.config)), trajectory(redact(composed))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise ConfigError(
                    f"{self.path} holds a run with {key}={old.get(key)!r}, now it is {new.get(key)!r}: "
                    "choose another name, or go back to the old value"
                )
        before = read_json(self.inputs) if self.inputs.is_file() else inputs
        changed = sorted(file for file in before.keys() | inputs.keys() if before.get(file) != inputs.get(file))
        if before and changed:
            raise ConfigError(
                f"{self.path} holds a run of other files: {', '.join(changed)} changed; choose another name"
            )

    def _failed_at_once(self) -> bool:
        """Whether the earlier attempt failed before it wrote a number that those of another config could mix with."""
        begun = self.step() >= 0 or (self.metrics.is_file() and self.metrics.stat().st_size > 0)
        return self.state() == "failed" and not begun


def inputs_of(composed: dict[str, Any]) -> dict[str, str]:
    """Size and sha256 of the local files that a run reads: data, world, and the model's folder."""
    named = [composed["dataset"].get(key) for key in ("path", "eval_path")] + [composed["model"].get("name_or_path")]
    paths = [Path(name) for name in named if name]
    files = [
        file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*"))) if file.is_file()
    ]
    return {str(file): _known_by(file) for file in files}


def _known_by(file: Path) -> str:
    """Large files, which weights are, by size alone: before training the step-0 check looks at what they do."""
    size = file.stat().st_size
    return f"{size} bytes" + (f", sha256 {sha256(file)}" if size < SIZE_ONLY else "")
