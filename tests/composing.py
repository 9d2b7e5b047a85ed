"""Compose the shipped config in a test, as the command line does, and do the run that it describes."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cdpo import train as command_line  # noqa: F401  # registers the resolvers
from cdpo.config.build import CONF
from cdpo.config.task import Task


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("config", overrides=list(overrides))
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]


def train(settings: dict[str, Any], directory: Path, command: str = "") -> dict[str, Any]:
    """The summary of the run of these settings, in this directory."""
    from cdpo.training.job import run

    return run(Task(Path(directory), settings, command))


#: what a choice needs beside its name
NEEDS = {
    "jsonl": ["dataset.path=rows.jsonl"],
    "hub": ["dataset.name=some/data"],
    "hf": ["model.name_or_path=some/model"],
    "lora": ["constraint.lora.rank=3"],
}


@cache
def chosen(group: str, choice: str) -> dict[str, Any]:
    """The config with a choice of a group; not to be changed."""
    return composed(f"{group}={choice}", *NEEDS.get(choice, []))


def node_of(group: str, choice: str) -> dict[str, Any]:
    """The part of the config that a choice of a group composes to, with what it inherits."""
    node = copy.deepcopy(chosen(group, choice)[group])
    return node.get(choice, {}) if group == "constraint" else node
