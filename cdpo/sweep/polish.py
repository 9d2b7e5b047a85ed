"""After a sweep of optimizer=exact: each search again, from the solutions of other runs too.

They are those of other losses on the same problem, and of the same loss at other levels of its constraints: a policy
that one loss led to may be better for another than all that its own starts found, and what a rank allows a higher one
does too. RLHF goes on last, from what the others have found by then: so it attains at least what they do.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cdpo.config.identity import trajectory
from cdpo.config.task import Task
from cdpo.system.files import json_object, remove, write_atomic
from cdpo.training.directory import RunDirectory

MORE = 1e-6  # attained, by which another loss beats RLHF
UNANIMOUS = 0.5  # share of starts that found the best, from which on no other solution is looked at


def to_polish(tasks: Iterable[Task], rlhf: bool) -> list[Task]:
    """The runs of RLHF, or of other losses, that are to search again, whose directories are made ready for it.

    Left out: what is proven to be optimal, what most starts found, and what has begun from all of these runs already.
    But not RLHF where another loss attains more.
    """
    solved = [task for task in tasks if RunDirectory(task.directory).solution.is_file()]
    problems, levels = _grouped(solved, _problem), _grouped(solved, _levels)
    of_kind = [task for task in solved if _is_rlhf(task) == rlhf]
    return [task for task in of_kind if _made_ready(task, problems[_problem(task)], levels[_levels(task)])]


def _grouped(tasks: Iterable[Task], key: Callable[[Task], str]) -> dict[str, list[Task]]:
    groups: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        groups[key(task)].append(task)
    return groups


def _is_rlhf(task: Task) -> bool:
    loss, beta = task.composed["loss"], task.composed["beta"]  # with another beta it maximises another J
    return (loss["_target_"], loss.get("rewards"), loss.get("beta")) == ("cdpo.losses.RLHF", "data", beta)


def _problem(task: Task) -> str:
    """All of a run's config but its loss, and how hard it searches."""
    return _config_without(task, "loss.")


def _levels(task: Task) -> str:
    """All of it but the numbers of its constraints, and how hard it searches."""
    kinds = [constraint["_target_"] for constraint in task.composed["constraint"].values()]
    return _config_without(task, "constraint") + str(kinds)


def _config_without(task: Task, *keys: str) -> str:
    without = (*keys, "optimizer.", "restart")
    kept = {key: value for key, value in trajectory(task.composed).items() if not key.startswith(without)}
    return json.dumps(kept, sort_keys=True, default=str)


def _made_ready(task: Task, same: list[Task], at_other_levels: list[Task]) -> bool:
    directory = RunDirectory(task.directory)
    certificate: dict[str, Any] = json_object(directory.summary)[0].get("certificate") or {}
    most = max(_attained(other) for other in same)
    beaten = _is_rlhf(task) and most > _attained(task) + MORE
    sure = certificate.get("status") == "certified" or (certificate.get("hits", 1.0) > UNANIMOUS and not beaten)
    others = {other.directory.name: other for other in [*same, *at_other_levels]}
    if sure or len(others) == 1 or (others.keys() <= _seen(directory) and not beaten):
        return False
    write_atomic(directory.starts, _together(others))
    for path in (directory.status, directory.checkpoints, directory.summary):  # without the first it is not done
        remove(path)
    return True


def _attained(task: Task) -> float:
    """What a run attains; minus infinity without rewards."""
    metrics = json_object(RunDirectory(task.directory).summary)[0].get("metrics") or {}
    return float(metrics.get("objective/attained", -math.inf))


def _seen(directory: RunDirectory) -> set[str]:
    """Whose solutions a run has begun from already."""
    from safetensors import safe_open

    if not directory.starts.is_file():
        return set()
    with safe_open(directory.starts, "pt") as file:
        return set(file.keys())


def _together(runs: Mapping[str, Task]) -> bytes:
    """The solutions of runs in one file, by the names of their directories."""
    from safetensors.torch import load_file, save

    return save({name: load_file(RunDirectory(run.directory).solution)["change"] for name, run in runs.items()})
