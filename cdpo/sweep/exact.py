"""Which runs of a sweep search for an optimum without being asked to: those on a table, where that can be solved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cdpo.config.schema import TABLES
from cdpo.config.task import Task

HOW = ("optimizer", "trainer.max_steps", "trainer.epochs", "trainer.batch_size", "trainer.max_grad_norm")


def told(overrides: Sequence[str], config: Any) -> bool:
    """Whether the command line, or an experiment, says how to train."""
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    said = any(key == how or key.startswith(f"{how}.") for key in keys for how in HOW)
    return said or "experiment" in keys or bool(config.hydra.runtime.choices.get("experiment"))


def solvable(task: object) -> bool:
    """Whether optimizer=exact would do this run."""
    if not isinstance(task, Task) or task.composed["model"]["_target_"] not in TABLES:
        return False
    from cdpo.training import checks  # with torch

    return checks.solvable(task.composed)
