"""cdpo-status DIR: which runs of a sweep wait, run (how far, how long yet), are finished, or failed, and why.

Reads the run directories and, where jobs were submitted, squeue; changes nothing. Nothing here needs accounting.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from cdpo.config.task import ENDING, JOBS, tasks_in
from cdpo.errors import CdpoError, ConfigError
from cdpo.report.runs import find
from cdpo.sweep.queue import Queued, accounted, queued
from cdpo.system.files import json_object
from cdpo.system.locks import alive
from cdpo.system.progress import console
from cdpo.training.directory import DONE, RunDirectory

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")


class Row(NamedTuple):
    """One run as people want to know it."""

    run: str
    state: str  # waiting, running, finished, stopped_early, failed, preempted, interrupted, not started
    step: str = ""
    left: str = ""
    cause: str = ""


def main() -> None:
    """The console script. Exit codes: 0, or 2 where there is no run."""
    parser = argparse.ArgumentParser("cdpo-status", description="What the runs in a directory are doing.")
    parser.add_argument("directory", type=Path, help="of a sweep, or of a run")
    parser.add_argument("--all", action="store_true", help="list finished runs too, and not only their number")
    given = parser.parse_args()
    try:
        show(rows(given.directory), given.all)
    except CdpoError as error:
        print(f"cdpo-status: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def rows(folder: Path) -> list[Row]:
    """One per run in `folder`, begun or submitted. Raises ConfigError if there is none."""
    runs, sweeps = find(folder)
    jobs = {sweep / name: job for sweep in sweeps for name, job in json_object(sweep / "jobs.json")[0].items()}
    paths = {*runs, *jobs, *(sweep / path.stem for sweep in sweeps for path in tasks_in(sweep))}
    if not paths:
        raise ConfigError(f"{folder} has no run")
    try:
        queue = queued([job["job_id"] for job in jobs.values()])
    except ConfigError as error:
        print(f"cdpo-status: what waits or runs is not known here ({error})", file=sys.stderr)
        queue, jobs = {}, {path: {"unknown": True} for path in jobs}
    gone = [job["job_id"] for job in jobs.values() if job.get("job_id", "") not in {"", *queue}]
    accounts = accounted(gone) if gone else {}
    found = {path.relative_to(folder).as_posix(): path for path in paths}
    return [_row(name, path, jobs.get(path, {}), queue, accounts) for name, path in sorted(found.items())]


def show(found: list[Row], finished: bool = False) -> None:
    """Print how many runs are in which state, and the table of those that are not `finished`, or of all."""
    out = console()
    out.print(", ".join(f"{count} {state}" for state, count in Counter(row.state for row in found).items()))
    table = Table()
    for name in Row._fields:
        table.add_column(name, overflow="fold")
    for row in found:
        if finished or row.state not in DONE:
            table.add_row(*row)
    if table.row_count:
        out.print(table)


def _row(name: str, path: Path, job: dict[str, Any], queue: dict[str, Queued], accounts: dict[str, str]) -> Row:
    status, _ = json_object(RunDirectory(path).status)
    ending, _ = json_object(path.parent / JOBS / f"{path.name}{ENDING}.json")
    state, cause = status.get("state"), str(status.get("cause") or ending.get("ending") or "")
    there = queue.get(job.get("job_id", ""))
    if state in DONE:
        return Row(name, state)
    if there and there.state in WAITING:
        return Row(name, "waiting", *_progress(path)[:1], cause=f"{there.state.lower()}: {there.reason}")
    if there or (state == "running" and alive(path)):
        return Row(name, "running", *_progress(path))
    account = accounts.get(job.get("job_id", ""))
    if state == "running":
        cause = f"{f'ended by SLURM ({account})' if account else 'killed'}; the same command goes on"
        cause = "no sign of life, and whether its job runs is not known here" if job.get("unknown") else cause
    elif job.get("unknown") and not cause:
        return Row(name, state or "not started", *_progress(path)[:1], cause="whether its job waits is not known here")
    elif job and not cause:  # it ended before it began
        cause = f"ended by SLURM ({account or 'there is no accounting'}) before it began: see {job.get('stderr')}"
    begun = {"running": "interrupted", None: "failed" if ending.get("exit_code") or job else "not started"}
    return Row(name, begun.get(state, str(state)), *_progress(path)[:1], cause=cause)


def _progress(folder: Path) -> tuple[str, str]:
    """Step, and time left; empty where the run has not said so."""
    said, _ = json_object(RunDirectory(folder).progress)
    if not said:
        return "", ""
    pace, steps = said["seconds_per_step"], said["steps"] - said["step"]
    left = max(0, round(pace * steps - (time.time() - said["time"]))) if pace else None
    return (
        f"{said['step']}/{said['steps']}",
        "" if left is None else f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}",
    )


if __name__ == "__main__":
    main()
