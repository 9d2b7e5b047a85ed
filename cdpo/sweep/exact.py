"""Which runs of a sweep search for an optimum without being asked to: those on a table, where that can be solved."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from cdpo.config.task import Task
from cdpo.errors import ConfigError

HOW = ("optimizer", "trainer.max_steps", "trainer.epochs", "trainer.batch_size", "trainer.max_grad_norm")
SEARCH = {"_target_": "cdpo.optim.Exact"}


def told(overrides: Sequence[str], config: Any) -> bool:
    """Whether the command line, or an experiment, says how to train."""
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    said = any(key == how or key.startswith(f"{how}.") for key in keys for how in HOW)
    return said or "experiment" in keys or bool(config.hydra.runtime.choices.get("experiment"))


def solvable(task: object) -> bool:
    """Whether optimizer=exact would do this run."""
    from cdpo.training.checks import checked

    if not isinstance(task, Task) or task.composed["model"]["_target_"] != "cdpo.model.Tabular":
        return False
    composed = copy.deepcopy(task.composed)
    composed["optimizer"] = SEARCH
    composed["trainer"] |= {"max_steps": 1, "batch_size": None}
    try:
        checked(composed)
    except ConfigError:
        return False
    return True
