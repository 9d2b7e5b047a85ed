"""Hydra launchers: `local`, a process per run on this machine, and `slurm`, a job per run.

Here runs are composed, as Hydra does it; what is done with them is in cdpo.sweep, which knows no Hydra.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

if TYPE_CHECKING:
    from cdpo.config.task import Task
    from cdpo.sweep import launch as sweeps
    from cdpo.sweep.outcome import Outcome


class Processes(Launcher):
    """What both have in common. cdpo is imported when a sweep is launched: Hydra imports this file at every start."""

    def __init__(self, **options: Any) -> None:
        self.options = options  # those of conf/hydra/launcher
        self.said = False  # what is done on tables

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's own; the task function is not used, as runs are carried out by other processes."""
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """All jobs of a sweep. Raises SystemExit with its exit code, unless all are done."""
        from cdpo.sweep.launch import launch

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        folder = Path(self.config.hydra.sweep.dir)
        if code := launch(map(self.composed, job_overrides), folder, self.how(), self.config.dry_run):
            sys.exit(code)
        return [JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED) for overrides in job_overrides]

    def composed(self, overrides: Sequence[str]) -> Task | Outcome:
        """A run with its config; on a table by optimizer=exact, unless told otherwise or where that cannot solve it."""
        from cdpo.sweep.exact import solvable, told

        found = self._composed(overrides)
        if told(overrides, self.config) or not solvable(found):
            return found
        if not self.said:
            self.said = True
            said = "in a sweep runs on a table search for the optimum, by optimizer=exact, where it can"
            print(f"{said} solve them; optimizer=adamw trains them", file=sys.stderr)
        return self._composed([*overrides, "optimizer=exact"])

    def _composed(self, overrides: Sequence[str]) -> Task | Outcome:
        """A run with its config; its outcome if it cannot be composed."""
        from cdpo.config.compose import composed_of, task_of
        from cdpo.sweep.outcome import failure

        with _at(self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))) as cfg:
            task = task_of(cfg)
            try:
                return replace(task, composed=composed_of(cfg))
            except Exception as error:
                return failure(task, error)

    def how(self) -> sweeps.Launcher:
        """How runs are carried out."""
        raise NotImplementedError


class Local(Processes):
    """The runs on this machine, one process each."""

    def how(self) -> sweeps.Launcher:
        from cdpo.sweep import local

        return local.Local(**self.options)


class Slurm(Processes):
    """A SLURM job per run."""

    def how(self) -> sweeps.Launcher:
        from cdpo.sweep import slurm

        return slurm.Slurm(**self.options)


@contextmanager
def _at(config: DictConfig) -> Iterator[DictConfig]:
    """Hydra's state as it is within a job; the job's part of the config."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        folder = Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = str(folder.resolve())
        HydraConfig.instance().set_config(config)
        cfg = copy.deepcopy(config)
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
        yield cfg
    finally:
        HydraConfig.instance().cfg = before
