"""A sweep: runs that are done are left out, the others are handed to processes, and what became of each is recorded."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from cdpo.config.task import Task, write_task
from cdpo.errors import ConfigError
from cdpo.sweep import seeds
from cdpo.sweep.estimate import dry_run
from cdpo.sweep.outcome import Outcome, earlier, end, failure
from cdpo.sweep.polish import to_polish
from cdpo.system.locks import locked
from cdpo.system.rendezvous import place
from cdpo.training.checks import checked


class Launcher(Protocol):
    """How runs are carried out: `local.Local` or `slurm.Slurm`, with the options of conf/hydra/launcher."""

    retry_failed: bool

    def check_options(self) -> None:
        """Raises ConfigError for an option that cannot be used."""

    def check(self, task: Task) -> None:
        """Raises ConfigError for a run that cannot be carried out so."""

    def carry_out(self, tasks: Sequence[Task], jobs: int) -> list[Outcome]:
        """Do the tasks, which are part of a sweep of so many jobs; those still under way have no outcome."""


def launch(tasks: Iterable[Task | Outcome], folder: Path, how: Launcher, dry: bool = False) -> int:
    """Carry out a sweep's runs in `folder`, or say what they would take (`dry`). What could not be composed has failed.

    Returns the exit code: 0, 75 if it was asked to stop, or 1 if a run failed or was refused. Raises ConfigError.
    """
    if place().size > 1:
        advice = "its runs have ranks of their own with hydra/launcher=slurm"
        raise ConfigError(f"a sweep is started by one process; {advice}")
    how.check_options()
    if dry:
        return _estimated(tasks, how)
    with locked(folder, "swept"):
        outcomes = _carried_out(_checked(tasks, how), how)
    return end(outcomes) if outcomes else 0


def _estimated(tasks: Iterable[Task | Outcome], how: Launcher) -> int:
    """Say what the runs would take, and do none. Returns 1 if some would be refused, else 0."""
    outcomes = dry_run(_checked(tasks, how))
    refused = sum(bool(outcome.exit_code) for outcome in outcomes)
    before = sum(outcome.ending == "done before" for outcome in outcomes)
    print(f"{len(outcomes)} runs: {before} done before, {refused} refused; nothing was started")
    return int(refused > 0)


def _checked(tasks: Iterable[Task | Outcome], how: Launcher) -> list[Task | Outcome]:
    """Every run once; an outcome where it is refused. Raises ConfigError if no seed changes anything."""
    found: dict[Path, Task | Outcome] = {}
    for one in tasks:
        found.setdefault(one.directory, one if isinstance(one, Outcome) else _refused(one, how) or one)
    seeds.check(one for one in found.values() if isinstance(one, Task))
    return list(found.values())


def _refused(task: Task, how: Launcher) -> Outcome | None:
    try:
        checked(task.composed)
        how.check(task)
    except Exception as error:
        return failure(task, error)
    return None


def _carried_out(tasks: list[Task | Outcome], how: Launcher) -> list[Outcome]:
    """What becomes of each run, in their order."""
    found = [task if isinstance(task, Outcome) else earlier(task, how.retry_failed) or task for task in tasks]
    todo = [task for task in found if isinstance(task, Task)]
    for task in todo:
        write_task(task)
    known = {outcome.directory: outcome for outcome in how.carry_out(todo, len(tasks))}
    outcomes = [known.get(one.directory) if isinstance(one, Task) else one for one in found]
    ended = [outcome for outcome in outcomes if outcome]
    polished = _polished(ended, how, rlhf=False)
    return _polished(polished, how, rlhf=True) if len(polished) == len(ended) else polished  # else some are under way


def _polished(outcomes: list[Outcome], how: Launcher, rlhf: bool) -> list[Outcome]:
    """The same after the searches for optima among them have seen each other's solutions (`cdpo.sweep.polish`).

    Those that are still under way are left out.
    """
    tasks = to_polish([outcome.task for outcome in outcomes if not outcome.exit_code], rlhf)
    if not tasks:
        return outcomes
    said = "from the solutions of other losses and levels too: at most half of their own starts found the best"
    last, beaten = ("RLHF last, ", ", or another loss attains more") if rlhf else ("", "")
    print(f"{len(tasks)} of {len(outcomes)} runs search again, {last}{said}{beaten}", file=sys.stderr)
    for task in tasks:
        write_task(task)
    again = {task.directory: None for task in tasks} | {one.directory: one for one in how.carry_out(tasks, len(tasks))}
    return [found for outcome in outcomes if (found := again.get(outcome.directory, outcome))]


def at_least(least: int, name: str, value: Any, kind: Any) -> None:
    """Raise ConfigError unless an option is a number of that kind, from `least` on."""
    if not (isinstance(value, kind) and value >= least):
        raise ConfigError(
            f"hydra.launcher.{name}={value} must be {'a whole' if kind is int else 'a'} number, at least {least}"
        )
