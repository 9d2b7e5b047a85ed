"""dry_run=true: what runs would take. Their data are read, their models built without weights; nothing is written."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from rich.table import Table

from cdpo.config.schema import Config
from cdpo.config.task import Task
from cdpo.model.memory import outline, persistent_bytes
from cdpo.sweep.outcome import Outcome, failure
from cdpo.system.progress import console
from cdpo.training.checks import check_searchable, checked
from cdpo.training.directory import RunDirectory
from cdpo.training.job import quiet_libraries
from cdpo.training.prepare import sets_of, tokenised
from cdpo.training.run import check_sizes
from cdpo.training.scored import Sets

DATA = ("dataset", "model", "loss", "seed")  # what decides on the Items of a run


class Estimate(NamedTuple):
    """What one run would take; None where it is not known."""

    items: int | None = None  # prompts with their responses, to train on
    steps: int | None = None  # of the optimizer, at most
    parameters: int | None = None
    trainable: int | None = None
    gib: float | None = None  # weights, gradients, optimizer state, copy of the start; activations come on top


def dry_run(tasks: Iterable[Task | Outcome]) -> list[Outcome]:
    """Print a table of runs, which are to do, or refused already; returns an outcome of each.

    Reads each run's data as the run itself would, so malformed rows and unfit tokenizers are found here.
    """
    logging.getLogger("cdpo").setLevel(logging.WARNING)  # else the same is said of the data for every run
    rows, outcomes, newest = [], [], dict[str, Any]()
    for task in tasks:
        outcome, found = (task, Estimate()) if isinstance(task, Outcome) else _asked(task, newest)
        outcomes.append(outcome)
        rows.append((outcome.task, found, "refused" if outcome.exit_code else outcome.ending))
    show(rows)
    for reason, count in Counter(outcome.ending for outcome in outcomes if outcome.exit_code).items():
        print(f"{count} refused: {reason}")
    return outcomes


def _asked(task: Task, newest: dict[str, Any]) -> tuple[Outcome, Estimate]:
    try:
        return Outcome(task, state_of(task), 0), estimate(task.composed, newest)
    except Exception as error:
        return failure(task, error), Estimate()


def estimate(composed: dict[str, Any], newest: dict[str, Any]) -> Estimate:
    """What a run would take; empty for a study, which does not train. `newest` keeps the data of the
    run that was asked for last, as neighbours in a grid share them.

    Raises what the run itself would, for its config, data, tokenizer and constraints.
    """
    quiet_libraries()
    spec = checked(composed)
    if spec.study is not None:
        return Estimate()
    key = json.dumps([composed[name] for name in DATA])
    if key not in newest:
        newest.clear()
        newest[key] = _data(spec)
    data, tokenizer, sets = newest[key]
    items = len(sets.train)
    check_sizes(spec.optimizer, spec.trainer, spec.constraint, items, len(sets.held_out))
    policy = outline(spec, tokenizer, data)
    check_searchable(spec, policy)
    sets.check_lengths(policy)
    numbers = sum(p.numel() for p in policy.parameters())
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    gib = persistent_bytes(policy, spec.states) / 2**30
    return Estimate(items, spec.trainer.steps(items), numbers, trainable, gib)


def _data(spec: Config) -> tuple[Any, Any, Sets]:
    """Rows, tokenizer, and the Items of the run."""
    data = spec.dataset.load(spec.seed)
    tokenizer = spec.model.tokenizer(data)
    return data, tokenizer, sets_of(spec, tokenised(spec, data, tokenizer))


def state_of(task: Task) -> str:
    """What a run's directory holds already."""
    directory = RunDirectory(task.directory)
    if directory.done():
        return "done before"
    state, step = directory.state(), directory.step()
    known = f"{state} before, " if state else ""
    return f"{known}goes on from step {step}" if step >= 0 else f"{known}to do"


def show(rows: Iterable[tuple[Task, Estimate, str]]) -> None:
    """Print runs, what they would take, and their state."""
    table = Table()
    for name in ("run", *Estimate._fields, "state"):
        table.add_column(name, overflow="fold", justify="left" if name in ("run", "state") else "right")
    for task, found, state in rows:
        table.add_row(task.directory.name, *map(_shown, found), state)
    console().print(table)


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
