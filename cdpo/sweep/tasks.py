"""A sweep: its runs as tasks that any process can carry out, what became of each, and what is written at the end.

A task travels as JSON, in SWEEP/.jobs/RUN.json, with its config resolved: what was submitted is what runs, whatever is
edited meanwhile. Its process says how it ended in RUN.ending.json; without that file it was killed.
"""

from __future__ import annotations

import logging
import shutil
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from cdpo.errors import CdpoError, Preempted
from cdpo.system.files import read_json, write_json

log = logging.getLogger(__name__)


class Task(NamedTuple):
    """One run to do."""

    directory: Path
    sweep: Path | None  # directory of the sweep that it belongs to
    command: str
    choices: dict[str, Any]

    def file(self, kind: str = "") -> Path:
        """Where the sweep keeps something of this task."""
        assert self.sweep is not None
        return self.sweep / ".jobs" / f"{self.directory.name}{kind}.json"

    @property
    def group(self) -> str | None:
        """The sweep's name, for the logger."""
        return self.sweep.name if self.sweep else None


class Outcome(NamedTuple):
    """What became of one run."""

    task: Task
    ending: str  # "done", or why not
    exit_code: int


ALONE = "a sweep is started by one process; its runs have ranks of their own with hydra/launcher=slurm"

#: of all runs that this process has carried out or waited for
OUTCOMES: list[Outcome] = []


def done(task: Task) -> Outcome:
    return Outcome(task, "done", 0)


def failure(task: Task, error: Exception) -> Outcome:
    """The outcome of a run that raised.

    Not the exception itself: its traceback would keep the model in memory through the rest of a sweep.
    """
    if not forget(task.directory) and not isinstance(error, CdpoError):
        log.error("%s", "".join(traceback.format_exception(error)))
    return Outcome(task, f"{type(error).__name__}: {error}", getattr(error, "exit_code", 1))


def forget(folder: Path) -> bool:
    """Remove a run directory in which nothing was begun; returns whether it was one."""
    bare = folder.is_dir() and {path.name for path in folder.iterdir()} <= {"train.log", "output.log"}
    if bare:
        shutil.rmtree(folder)
    return bare


# ------------------------------------------------------------------------------------------------ tasks on their way


def write_task(task: Task, composed: dict[str, Any]) -> Path:
    """Put a task where another process finds it; forgets how it ended before, and its requeues. Raises DiskError."""
    path = task.file()
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind in (".ending", ".requeues"):
        task.file(kind).unlink(missing_ok=True)
    plain = task._asdict() | {"directory": str(task.directory), "sweep": str(task.sweep), "composed": composed}
    write_json(path, plain)
    return path


def read_task(path: Path) -> tuple[Task, dict[str, Any]]:
    """A task and its config."""
    plain = read_json(path)
    return Task(Path(plain["directory"]), Path(plain["sweep"]), plain["command"], plain["choices"]), plain["composed"]


def write_ending(outcome: Outcome, **more: Any) -> None:
    """Say how a task ended."""
    write_json(outcome.task.file(".ending"), {"ending": outcome.ending, "exit_code": outcome.exit_code, **more})


def read_ending(task: Task) -> Outcome | None:
    """How a task ended; None if it has not, or was killed."""
    path = task.file(".ending")
    if not path.is_file():
        return None
    ending = read_json(path)
    return Outcome(task, ending["ending"], ending["exit_code"])


def earlier(task: Task, retry_failed: bool) -> Outcome | None:
    """The outcome that a run has already: finished, or failed and not to be tried again. None if it is to be done."""
    path = task.directory / "status.json"
    status = read_json(path) if path.is_file() else {}
    if status.get("state") in ("finished", "stopped_early"):
        return Outcome(task, "done before", 0)
    if status.get("state") == "failed" and not retry_failed:
        return Outcome(task, f"failed before, hydra.launcher.retry_failed=true tries again: {status.get('cause')}", 1)
    return None


# -------------------------------------------------------------------------------------------------------- at the end


def sweeps() -> set[Path]:
    """Directories of the sweeps, one as a rule, that the runs of this process belong to."""
    return {outcome.task.sweep for outcome in OUTCOMES if outcome.task.sweep}


def end() -> int:
    """One line per run, sweep.json, the report; returns 0 if all are done, 75 if it was asked to stop, else 1."""
    from cdpo.system.progress import summary_table

    table = {outcome.task.directory.name: outcome.ending[:100] for outcome in OUTCOMES}
    summary_table(table, title=f"{len(OUTCOMES)} runs, {sum(not outcome.exit_code for outcome in OUTCOMES)} done")
    for folder in sweeps():
        record(folder / "sweep.json", OUTCOMES)
        report(folder)
    failures = {outcome.exit_code for outcome in OUTCOMES if outcome.exit_code}
    return Preempted.exit_code if failures == {Preempted.exit_code} else int(bool(failures))


def record(path: Path, outcomes: list[Outcome]) -> None:
    """Add runs to those that earlier sweeps in the same directory have recorded."""
    known = {run["directory"]: run for run in read_json(path)["runs"]} if path.is_file() else {}
    for task, ending, code in outcomes:
        kept = {"directory": task.directory.name, "command": task.command, "choices": task.choices}
        known[task.directory.name] = kept | {"ending": ending, "exit_code": code}
    write_json(path, {"runs": list(known.values())})


def report(folder: Path) -> None:
    """Write the report of a sweep. Whatever goes wrong with it, the runs are what they are."""
    try:
        from cdpo.report.write import report as write

        print(f"report: {write(folder)}")
    except Exception as error:
        log.warning("no report (%s: %s); `cdpo-report %s` tries again", type(error).__name__, error, folder)
