"""A Hydra sweeper for a union of grids: what an experiment needs when not every choice meets every other.

`hydra.sweeper.params` are axes that all grids share, as in Hydra's own sweeper, which this is where there are no grids.
The command line changes those, adds others, and narrows what stands in a grid: it never drops a value unsaid.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

Axes = dict[str, dict[str, str]]  # key -> value -> "key=value"

NODE = {
    "_target_": "hydra_plugins.cdpo_grids.Grids",
    "max_batch_size": None,
    "params": None,  # axes of every grid: key -> values, separated by commas
    "grids": None,  # a list of further axes, one entry for each grid
}
ConfigStore.instance().store(group="hydra/sweeper", name="grids", node=NODE, provider="cdpo")


class Grids(BasicSweeper):
    """The jobs of all grids, one after another. A key of the command line replaces one of params, and narrows grids."""

    def __init__(
        self,
        max_batch_size: int | None = None,
        params: dict[str, str] | None = None,
        grids: list[dict[str, str]] | None = None,
    ) -> None:
        super().__init__(max_batch_size, params)
        self.grids = grids or [{}]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Raises HydraException for an interpolation in a grid: it would be resolved once, not in each job."""
        BasicSweeper.setup(self, hydra_context=hydra_context, task_function=task_function, config=config)
        for grid in OmegaConf.to_container(config.hydra.sweeper, resolve=False)["grids"] or []:  # type: ignore
            if key := next((key for key, value in grid.items() if "${" in str(value)), None):
                raise HydraException(f"hydra.sweeper.grids: {key}={grid[key]} is an interpolation; write its value out")

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[Any]:
        """All jobs as lists of overrides, in chunks. Raises HydraException for a value that no job would have."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        grids = [axes(parser.parse_overrides([f"{k}={v}" for k, v in grid.items()])) for grid in self.grids]
        base, given = axes(overrides), axes(overrides[len(self.params or {}) :])  # Hydra puts params first
        check(given, grids)
        whole = [narrowed(base, grid) for grid in grids]
        kept = [grid for grid in whole if all(grid.values())]
        if not kept:
            raise HydraException("hydra.sweeper.params and hydra.sweeper.grids have no value in common")
        if len(kept) < len(grids):
            said = f"the command line leaves {len(kept)} of the experiment's {len(grids)} grids"
            print(said, file=sys.stderr)  # logging is set up by each job
        for number, (grid, narrow) in enumerate(zip(grids, whole), start=1):
            if all(narrow.values()) and (texts := lost(given, grid)):
                print(f"grid {number} runs without {', '.join(texts)}", file=sys.stderr)
        jobs = [list(job) for grid in kept for job in itertools.product(*(axis.values() for axis in grid.values()))]
        return list(self.split_overrides_to_chunks(jobs, max_batch_size))

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose jobs until every override has been in one; all of them would take as long as small runs do."""
        seen: set[str] = set()
        some = []
        for job in batch:
            if not seen.issuperset(job):
                seen |= set(job)
                some.append(job)
        super().validate_batch_is_legal(some)


def axes(overrides: list[Override]) -> Axes:
    """Every key's values; a number written in two ways is its first writing, and the last override of a key counts.

    Raises HydraException for a sweep over anything but a list, and for one without a value.
    """
    found: Axes = {}
    for override in overrides:
        key = override.get_key_element()
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise HydraException(f"{key}: only lists of values can be swept, not {override.value_type}")
        values = override.sweep_string_iterator() if override.is_sweep_override() else None
        texts = [override.get_value_element_as_str()] if values is None else list(values)
        if not texts:
            raise HydraException(f"{override.input_line}: no value matches, so there is nothing to run")
        axis = found[key.lstrip("+")] = {}
        for text in texts:
            axis.setdefault(plain(text), f"{key}={text}")
    return found


def plain(text: str) -> str:
    """A value as it is compared: 2, 2.0 and 2e0 are one."""
    try:
        return repr(float(text))
    except ValueError:
        return text.strip("'\"")


def narrowed(base: Axes, grid: Axes) -> Axes:
    """The axes of one grid with those of `base`; where both have a key, the values that both have."""
    common = {
        key: {value: text for value, text in axis.items() if value in base.get(key, axis)} for key, axis in grid.items()
    }
    return base | common


def check(given: Axes, grids: list[Axes]) -> None:
    """HydraException where a value of the command line is in no grid, or in none that its other keys leave."""
    given = {key: axis for key, axis in given.items() if any(key in grid for grid in grids)}
    values = [(key, value, text) for key, axis in given.items() for value, text in axis.items()]
    for key, value, text in values:
        if all(value not in grid.get(key, given[key]) for grid in grids):
            known = {text: None for grid in grids for text in grid[key].values()}
            raise HydraException(f"no grid of this experiment has {text}; there are {', '.join(known)}")
    for key, value, text in values:
        blocked = [emptied(given, grid) for grid in grids if value in grid.get(key, given[key])]
        if all(blocked):
            others = ", ".join({text: None for texts in blocked for text in texts})
            raise HydraException(f"no grid of this experiment has {text} together with {others}")


def emptied(given: Axes, grid: Axes) -> list[str]:
    """The overrides of the command line whose keys stand in a grid without any of their values."""
    none = [axis for key, axis in given.items() if not any(value in grid.get(key, axis) for value in axis)]
    return [text for axis in none for text in axis.values()]


def lost(given: Axes, grid: Axes) -> list[str]:
    """The overrides of the command line whose values a grid does not have, though it has their keys."""
    return [text for key, axis in given.items() for value, text in axis.items() if value not in grid.get(key, axis)]
