"""Hydra's config to a Task in plain values, which any process can carry out; and the names of directories.

Only here, in train.py and in launch/ is there a DictConfig. Imports no torch.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cdpo.config.build import CONF
from cdpo.config.identity import run_name
from cdpo.config.schema import check_name
from cdpo.config.task import Task
from cdpo.errors import ConfigError


def task_of(cfg: DictConfig) -> Task:
    """The run that Hydra is at, whose config without the hydra node is `cfg`, its config still to be resolved."""
    settings = HydraConfig.get()
    sweep = Path(settings.sweep.dir).resolve() if settings.mode == RunMode.MULTIRUN else None
    command = shlex.join(["cdpo-train", *["-m"] * bool(sweep), *settings.overrides.task])
    return Task(Path(settings.runtime.output_dir).resolve(), {}, command, _chosen(cfg), sweep)


def composed_of(cfg: DictConfig) -> dict[str, Any]:
    """Its config, resolved. Raises ConfigError for what may not be set, OmegaConf's errors for what cannot be."""
    overrides = list(HydraConfig.get().overrides.task)
    composed: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    _only_from_the_command_line(composed, overrides)
    _used_by_the_task(composed, overrides)
    return composed  # type: ignore[no-any-return]


def _chosen(cfg: DictConfig) -> dict[str, Any]:
    """The names of the chosen files, group by group; for the report."""
    choices = _choices(cfg) | dict(HydraConfig.get().runtime.choices)
    groups = ("experiment", "model", "dataset", "loss", "optimizer")
    return {group: choices.get(group) for group in groups} | {"constraint": list(cfg.get("constraint") or {})}


def _only_from_the_command_line(composed: dict[str, Any], overrides: list[str]) -> None:
    """Remote code may be trusted by the person at the command line, never by a file."""
    trusted = (composed.get("model") or {}).get("trust_remote_code")
    if trusted and not any(override.lstrip("+").startswith("model.trust_remote_code=") for override in overrides):
        raise ConfigError("model.trust_remote_code can only be set on the command line")


def _used_by_the_task(composed: dict[str, Any], overrides: list[str]) -> None:
    """ConfigError for an option of training where the experiment is a study, which does not train."""
    used = r"(experiment|study|seed|name|output_root|cache_dir|dry_run|allow_targets|logger)\b"
    unused = [override for override in overrides if not re.match(used, override.lstrip("+~"))]
    if composed.get("study") is not None and unused:
        raise ConfigError(f"{', '.join(unused)}: this experiment does not train; its own keys begin with study.")


# ------------------------------------------------------------------------------------------ names for the config files


def _choices(root: Any) -> dict[str, Any]:
    return dict(OmegaConf.select(root, "hydra.runtime.choices") or {})


def _plain(root: Any) -> dict[str, Any]:
    """The job's part of a config, unresolved, as plain dictionaries."""
    node = OmegaConf.masked_copy(root, [key for key in root if key != "hydra"])
    return OmegaConf.to_container(node, resolve=False)  # type: ignore[return-value]


def _run_name(*, _root_: DictConfig) -> str:
    return run_name(_plain(_root_), _choices(_root_))


def _run_dir(*, _root_: DictConfig) -> str:
    check_name(_root_.name)  # before Hydra makes the directory
    return str(Path(str(_root_.output_root)) / str(_root_.name or _run_name(_root_=_root_)))


def _sweep_dir(*, _root_: DictConfig) -> str:
    check_name(_root_.name)
    return str(Path(str(_root_.output_root), *([str(_root_.name)] if _root_.name else [])))


def _world(name: str) -> str:
    return str(CONF / "worlds" / f"{name}.json")


RESOLVERS: dict[str, Any] = {"run_name": _run_name, "run_dir": _run_dir, "sweep_dir": _sweep_dir, "world": _world}
for _name, _resolver in RESOLVERS.items():
    OmegaConf.register_new_resolver(f"cdpo.{_name}", _resolver, replace=True)
