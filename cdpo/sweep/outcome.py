"""What became of the runs of a sweep. The process of each says how it ended, in a file; without that it was killed."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cdpo.config.task import ENDING, Task, file_of
from cdpo.errors import CdpoError, Preempted
from cdpo.system.files import json_object, read_json, write_json
from cdpo.system.progress import summary_table
from cdpo.training.directory import RunDirectory

log = logging.getLogger(__name__)

PREEMPTED = Preempted.exit_code  # of a run that goes on when the same command is given again


class Outcome(NamedTuple):
    """What became of one run."""

    task: Task
    ending: str  # "done", or why not
    exit_code: int

    @property
    def directory(self) -> Path:
        """Of the run."""
        return self.task.directory


def done(task: Task) -> Outcome:
    """The outcome of a run that went through."""
    return Outcome(task, "done", 0)


def failure(task: Task, error: Exception) -> Outcome:
    """The outcome of a run that raised; removes its directory if nothing was begun in it, logs what is no CdpoError."""
    if not RunDirectory(task.directory).remove_if_bare() and not isinstance(error, CdpoError):
        log.error("%s", "".join(traceback.format_exception(error)))
    return Outcome(task, f"{type(error).__name__}: {error}", getattr(error, "exit_code", 1))


def write_ending(outcome: Outcome, **more: Any) -> None:
    """Say how a task ended."""
    write_json(file_of(outcome.task, ENDING), {"ending": outcome.ending, "exit_code": outcome.exit_code, **more})


def read_ending(task: Task) -> Outcome | None:
    """How a task ended; None if it has not, or was killed."""
    path = file_of(task, ENDING)
    if not path.is_file():
        return None
    ending = read_json(path)
    return Outcome(task, ending["ending"], ending["exit_code"])


def earlier(task: Task, retry_failed: bool) -> Outcome | None:
    """The outcome that a run has already: finished, or failed and not to be tried again. None if it is to be done."""
    directory = RunDirectory(task.directory)
    if directory.done():
        return Outcome(task, "done before", 0)
    if directory.state() == "failed" and not retry_failed:
        cause = json_object(directory.status)[0].get("cause")
        return Outcome(task, f"failed before, hydra.launcher.retry_failed=true tries again: {cause}", 1)
    return None


def reported(task: Task) -> Outcome | None:
    """How a run says that it ended; None if it says nothing, or was stopped and would go on."""
    said = read_ending(task)
    return earlier(task, retry_failed=True) if said is None or said.exit_code == PREEMPTED else said


# -------------------------------------------------------------------------------------------------------- at the end


def end(outcomes: Sequence[Outcome]) -> int:
    """One line per run; its record and the report in the folder of each sweep, of which a swept `name` makes several.

    Returns 0 if all are done, 75 if it was asked to stop, else 1.
    """
    table = {outcome.directory.name: outcome.ending[:100] for outcome in outcomes}
    summary_table(table, title=f"{len(outcomes)} runs, {sum(not outcome.exit_code for outcome in outcomes)} done")
    for folder in dict.fromkeys(outcome.directory.parent for outcome in outcomes):
        record(folder / "sweep.json", [outcome for outcome in outcomes if outcome.directory.parent == folder])
        report(folder)
    failures = {outcome.exit_code for outcome in outcomes if outcome.exit_code}
    return PREEMPTED if failures == {PREEMPTED} else int(bool(failures))


def record(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Add runs to those that earlier sweeps in the same directory have recorded."""
    known = {run["directory"]: run for run in read_json(path)["runs"]} if path.is_file() else {}
    for task, ending, code in outcomes:
        kept = {"directory": task.directory.name, "command": task.command, "choices": task.choices}
        known[task.directory.name] = kept | {"ending": ending, "exit_code": code}
    write_json(path, {"runs": list(known.values())})


def report(folder: Path) -> None:
    """Write the report of a sweep. Whatever goes wrong with it, the runs are what they are."""
    try:
        from cdpo.report.write import report as write  # with pandas and matplotlib

        print(f"report: {write(folder)}")
    except Exception as error:
        log.warning("no report (%s: %s); `cdpo-report %s` tries again", type(error).__name__, error, folder)
