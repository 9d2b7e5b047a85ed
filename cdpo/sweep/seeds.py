"""Seeds that change nothing are told before a sweep starts: their runs would be one run repeated, and no interval.

Known is the case in which all is exact: a bandit with every pair, full batches, a model and constraints without draws.
Any other run is taken to draw something; a report marks those whose numbers agree all the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from cdpo.config.identity import flat, trajectory
from cdpo.config.task import Task
from cdpo.errors import ConfigError

DRAWN = ("cdpo.constraints.LoRA", "cdpo.constraints.Dropout")  # initialisation, masks
MODELS = ("cdpo.model.Tabular", "cdpo.model.LogLinear", "cdpo.model.Tiny")  # whose start is not drawn by the seed
EXACT = {"model": MODELS, "dataset": ("cdpo.data.Bandit",)}
ADVICE = "drop them, draw a world for each (dataset.world_seed='${seed}'), or sample (dataset.preferences=sampled)"


def check(tasks: Iterable[Task]) -> None:
    """Say for which choices the seeds of a sweep change nothing. Raises ConfigError if that is so for every run."""
    groups: dict[str, list[Task]] = {}  # runs that differ in the seed only
    for task in tasks:
        same = trajectory(task.composed) | {"seed": None}
        groups.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(task)
    idle = [task for group in groups.values() if _several(group) and not draws(group[0].composed) for task in group]
    if not idle:
        return
    said = f"seed={_listed(task.composed['seed'] for task in idle)} changes nothing for {_choices(idle)}: {ADVICE}"
    if len(idle) == sum(map(len, groups.values())):
        raise ConfigError(said)
    print(said, file=sys.stderr)  # a sweep's own logging says what became of the runs


def draws(composed: Mapping[str, Any]) -> bool:
    """Whether the seed may change anything of a run: order of the data, adapters, dropout, samples, pairs, a study."""
    keys = flat(composed)
    target = {part: str(keys.get(f"{part}._target_")) for part in ("model", "dataset", "loss")}
    exact = all(target[part] in names for part, names in EXACT.items()) and target["loss"].startswith("cdpo.losses.")
    kinds = [str(keys.get(f"constraint.{name}._target_")) for name in composed["constraint"]]
    exact &= all(kind.startswith("cdpo.constraints.") and kind not in DRAWN for kind in kinds)
    drawn = ("dataset.pairs", "dataset.eval_pairs", "trainer.samples", "study", "study._target_")
    searched = "optimizer.starts" in keys  # where null stands for some
    return not exact or searched or any(keys.get(key) for key in drawn) or not _full_batch(keys)


def _full_batch(keys: Mapping[str, Any]) -> bool:
    size, prompts = keys["trainer.batch_size"], keys["dataset.prompts"]
    return size is None or (keys.get("dataset.path") is None and size >= prompts)


def _several(group: list[Task]) -> bool:
    return len({task.composed["seed"] for task in group}) > 1


def _choices(idle: list[Task]) -> str:
    """`dataset=bandit model=tabular constraint=none,l2_ball`."""
    names = {part: _listed(task.choices.get(part) for task in idle) for part in ("dataset", "model")}
    names["constraint"] = _listed("+".join(task.composed["constraint"]) or "none" for task in idle)
    return " ".join(f"{part}={listed}" for part, listed in names.items())


def _listed(values: Iterable[Any]) -> str:
    return ",".join(dict.fromkeys(map(str, values)))
