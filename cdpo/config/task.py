"""One run to do, in plain values: it waits in a file of its sweep, and any process can carry it out.

A task of a sweep is kept in SWEEP/.jobs/RUN.json with its config resolved: what was submitted is what runs, whatever is
edited meanwhile. How it ended stands beside it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cdpo.system.files import read_json, write_json

JOBS = ".jobs"  # where a sweep keeps its tasks
ENDING, REQUEUES = ".ending", ".requeues"  # what stands beside a task


@dataclass(frozen=True)
class Task:
    """A run to do. All but `directory` and `composed` is only written down."""

    directory: Path  # of the run
    composed: dict[str, Any]  # the config, resolved
    command: str = ""  # makes this run again
    choices: dict[str, Any] = field(default_factory=dict)  # the name of the chosen file in each config group
    sweep: Path | None = None  # directory of the sweep that the run belongs to


def file_of(task: Task, beside: str = "") -> Path:
    """Where the sweep keeps a task, or something `beside` it."""
    assert task.sweep is not None
    return task.sweep / JOBS / f"{task.directory.name}{beside}.json"


def tasks_in(sweep: Path) -> list[Path]:
    """The task files of a sweep, one per run that it was to do, named after the run's directory."""
    beside = (f"{ENDING}.json", f"{REQUEUES}.json")
    return sorted(path for path in (sweep / JOBS).glob("*.json") if not path.name.endswith(beside))


def write_task(task: Task) -> None:
    """Put a task where another process finds it; forgets how it ended before, and its requeues. Raises DiskError."""
    file_of(task).parent.mkdir(parents=True, exist_ok=True)
    for beside in (ENDING, REQUEUES):
        file_of(task, beside).unlink(missing_ok=True)
    write_json(file_of(task), asdict(task) | {"directory": str(task.directory), "sweep": str(task.sweep)})


def read_task(path: Path) -> Task:
    """A task that was written."""
    plain = read_json(path)
    return Task(**plain | {"directory": Path(plain["directory"]), "sweep": Path(plain["sweep"])})
