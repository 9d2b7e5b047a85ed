"""Hydra launchers: `local`, a process per run on this machine, and `slurm`, a job per run.

Both compose and check every run first, leave out what is done, and give the others to processes that know no Hydra.
"""

from __future__ import annotations

import copy
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from cdpo.system.signals import Signals

if TYPE_CHECKING:
    from cdpo.sweep.slurm import Queued
    from cdpo.sweep.tasks import Outcome, Task

log = logging.getLogger(__name__)


class Processes(Launcher):
    """What both have in common."""

    def __init__(self, retry_failed: bool) -> None:
        self.retry_failed = retry_failed

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's own; the task function is not used, as jobs run outside of Hydra."""
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """All jobs of a sweep; what became of each is added to cdpo.sweep.OUTCOMES."""
        from cdpo.sweep import tasks as sweep
        from cdpo.errors import ConfigError
        from cdpo.system.locks import locked
        from cdpo.system.rendezvous import place

        if place().size > 1:
            raise ConfigError(sweep.ALONE)
        self.check()
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        if self.config.dry_run:
            return self.dry(job_overrides)
        with locked(Path(self.config.hydra.sweep.dir), "swept"):
            outcomes = self.outcomes(job_overrides)
        sweep.OUTCOMES.extend(outcomes)
        return [_returned(outcome) for outcome in outcomes]

    def check(self) -> None:
        """ConfigError for an option that cannot be used."""

    def dry(self, job_overrides: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        """Say what the jobs would be, and do none."""
        from cdpo.sweep.estimate import dry_run

        composed = {found[0].directory: found for found in map(self.composed, job_overrides)}
        outcomes = dry_run(composed.values())
        refused = sum(bool(outcome.exit_code) for outcome in outcomes)
        before = sum(outcome.ending == "done before" for outcome in outcomes)
        print(f"{len(outcomes)} runs: {before} done before, {refused} refused; nothing was started")
        sys.exit(int(refused > 0))

    def outcomes(self, job_overrides: Sequence[Sequence[str]]) -> list[Outcome]:
        """What becomes of each run, in the order of the jobs."""
        from cdpo.sweep import tasks as sweep

        known: dict[Path, Outcome] = {}
        todo: list[Task] = []
        tasks: dict[Path, Task] = {}
        for overrides in job_overrides:
            task, composed, problem = self.composed(overrides)
            if task.directory in tasks:
                continue
            tasks[task.directory] = task
            found = problem or sweep.earlier(task, self.retry_failed)
            if found:
                known[task.directory] = found
            else:
                sweep.write_task(task, composed)
                todo.append(task)
        known |= {outcome.task.directory: outcome for outcome in self.carried_out(todo, len(tasks))}
        return [known[directory] for directory in tasks if directory in known]

    def composed(self, overrides: Sequence[str]) -> tuple[Task, dict[str, Any], Outcome | None]:
        """A run as a task with its config, checked; and the outcome, if it cannot be run."""
        from cdpo.training.checks import read
        from cdpo.config.compose import composed_of, task_of
        from cdpo.sweep.tasks import failure

        with _at(self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))) as cfg:
            task = task_of(cfg)
            try:
                composed = composed_of(cfg)
                read(composed)
            except Exception as error:
                return task, {}, failure(task, error)
            return task, composed, None

    def carried_out(self, tasks: list[Task], jobs: int) -> list[Outcome]:
        """Do the tasks, which are part of a sweep of so many jobs."""
        raise NotImplementedError


class Local(Processes):
    """At most `at_once` runs at a time on this machine, each in its own process; null: one per GPU, or per core."""

    def __init__(self, at_once: int | None = None, retry_failed: bool = False) -> None:
        super().__init__(retry_failed)
        self.at_once = at_once

    def check(self) -> None:
        if self.at_once is not None:
            at_least(1, "at_once", self.at_once, int)

    def carried_out(self, tasks: list[Task], jobs: int) -> list[Outcome]:
        """Through cdpo.local, which gets every signal that comes here."""
        from cdpo.system.progress import Progress
        from cdpo.sweep.tasks import read_ending

        if not tasks:
            return []
        by_file = {str(task.file()): task for task in tasks}
        codes: dict[str, int] = {}
        plan = {"files": list(by_file), "jobs": jobs, "at_once": self.at_once}
        with _pool(plan) as lines, Progress(len(tasks), 0, "runs") as bar:
            for line in lines:
                ended = json.loads(line)
                codes[ended["file"]] = ended["code"]
                bar.update(len(codes))
        return [
            _own_word(task) or read_ending(task) or _killed(task, codes.get(file)) for file, task in by_file.items()
        ]


class Slurm(Processes):
    """A SLURM job per run, in arrays. What is not named here is an option of sbatch, as submitit knows them."""

    def __init__(
        self, wait: bool = True, poll_s: float = 10.0, retry_failed: bool = False, max_requeues: int = 3, **sbatch: Any
    ) -> None:
        super().__init__(retry_failed)
        self.wait, self.poll_s, self.max_requeues = wait, poll_s, max_requeues
        given = {key: value for key, value in sbatch.items() if value not in (None, [], {})}
        if "mem_gb" in given:
            given["mem_gb"] = f"{given['mem_gb']}GB"  # a bare number means megabytes
        self.sbatch = {SUBMITIT.get(key, key): value for key, value in given.items()}

    def check(self) -> None:
        at_least(0, "poll_s", self.poll_s, (int, float))
        at_least(0, "max_requeues", self.max_requeues, int)

    def composed(self, overrides: Sequence[str]) -> tuple[Task, dict[str, Any], Outcome | None]:
        """The same; a job of several tasks, all of which do one run, needs to be told how they share it."""
        from cdpo.errors import ConfigError
        from cdpo.sweep.tasks import failure

        task, composed, problem = super().composed(overrides)
        ranks = self.sbatch.get("nodes", 1) * self.sbatch.get("ntasks_per_node", 1)
        if problem is None and ranks > 1 and composed["trainer"]["distributed"] == "none":
            advice = "set trainer.distributed=ddp or fsdp, or hydra.launcher.nodes=1 hydra.launcher.tasks_per_node=1"
            problem = failure(task, ConfigError(f"{ranks} tasks, and trainer.distributed=none trains in one: {advice}"))
        return task, composed, problem

    def carried_out(self, tasks: list[Task], jobs: int) -> list[Outcome]:
        """Submit what is not in the queue already; then wait until it is empty, or return at once."""
        from cdpo.sweep import slurm
        from cdpo.system.files import read_json, write_json

        folder = Path(self.config.hydra.sweep.dir).resolve()
        file = folder / "jobs.json"
        known = read_json(file) if file.is_file() else {}
        there = slurm.queued([known[task.directory.name]["job_id"] for task in tasks if task.directory.name in known])
        new = [task for task in tasks if known.get(task.directory.name, {}).get("job_id") not in there]
        options = {"job_name": f"cdpo-{folder.name}"} | self.sbatch

        def keep(sent: list[dict[str, str]]) -> None:
            jobs = {task.directory.name: {**job, "command": task.command} for task, job in zip(new, sent)}
            write_json(file, known | jobs)

        sent = slurm.submit([task.file() for task in new], folder / ".submitit", options, self.max_requeues, keep)
        known |= {task.directory.name: job for task, job in zip(new, sent)}
        print(f"{len(new)} jobs submitted, {len(tasks) - len(new)} in the queue before; cdpo-status {folder}")
        return self.waited(tasks, [known[task.directory.name]["job_id"] for task in tasks]) if self.wait else []

    def waited(self, tasks: list[Task], ids: list[str]) -> list[Outcome]:
        """Wait for the jobs of tasks. Ctrl-C ends the waiting, not the jobs."""
        from cdpo.sweep import slurm
        from cdpo.system.progress import Progress

        states = dict.fromkeys(ids, slurm.Queued("PENDING"))
        with suppress(KeyboardInterrupt), Progress(len(ids), 0, "jobs", quiet=not ids) as bar:
            while states := self.still(ids, states):
                running = [one.state for one in states.values()].count("RUNNING")
                bar.update(len(ids) - len(states), running=running, waiting=len(states) - running)
                time.sleep(self.poll_s)
            bar.update(len(ids))
        over = [(task, job) for task, job in zip(tasks, ids) if job not in states]
        accounts = slurm.settled([job for task, job in over if _own_word(task) is None])
        return [self.outcome(task, job, states, accounts) for task, job in zip(tasks, ids)]

    def still(self, ids: list[str], before: dict[str, Queued]) -> dict[str, Queued]:
        """States of the jobs that are not over; as they were `before` where the controller does not answer."""
        from cdpo.sweep import slurm
        from cdpo.errors import ConfigError

        try:
            return slurm.queued(ids)
        except ConfigError as error:
            log.warning("%s; asking again in %g s", error, self.poll_s)
            return before

    def outcome(self, task: Task, job: str, states: dict[str, Queued], accounts: dict[str, str]) -> Outcome:
        """What a run says of itself; else what SLURM does."""
        from cdpo.sweep.tasks import Outcome

        if job in states:
            return Outcome(task, f"job {job} is {states[job].state.lower()}: cdpo-status, scancel {job}", 75)
        account = accounts.get(job, "without a word, and there is no accounting")
        ended = f"job {job} was ended by SLURM ({account}), and jobs.json names its logs; the same command goes on"
        return _own_word(task) or Outcome(task, ended, 1)


#: what cdpo's files and submitit call by another name than sbatch
SUBMITIT = {"timeout_min": "time", "tasks_per_node": "ntasks_per_node", "mem_gb": "mem"}


def at_least(least: int, name: str, value: Any, kind: Any) -> None:
    """Raise ConfigError unless an option is a number of that kind, from `least` on."""
    from cdpo.errors import ConfigError

    if not (isinstance(value, kind) and value >= least):
        raise ConfigError(
            f"hydra.launcher.{name}={value} must be {'a whole' if kind is int else 'a'} number, at least {least}"
        )


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


@contextmanager
def _pool(plan: dict[str, Any]) -> Iterator[Any]:
    """cdpo.sweep.local at work on a plan, in a session of its own: it gets signals from here only, each of them once."""
    command = [sys.executable, "-m", "cdpo.sweep.local"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as pool:  # type: ignore[call-overload]
        handlers = {n: signal.signal(n, lambda n, _: pool.send_signal(n)) for n in Signals.HANDLED}
        try:
            pool.stdin.write(json.dumps(plan))
            pool.stdin.close()
            yield pool.stdout
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if pool.returncode > 0:
        raise RuntimeError(f"the process that starts the runs ended with {pool.returncode}; its message stands above")


def _own_word(task: Task) -> Outcome | None:
    """What a run says of its end, unless it was stopped before, or says nothing."""
    from cdpo.sweep.tasks import earlier, read_ending

    said = read_ending(task)
    return earlier(task, retry_failed=True) if said is None or said.exit_code == 75 else said


def _killed(task: Task, code: int | None) -> Outcome:
    """The outcome of a process that ended without a word; None: it was never started."""
    from cdpo.sweep.tasks import Outcome

    if code is None:
        return Outcome(task, "not started, as the sweep was asked to stop; the same command starts it", 75)
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended by an exit({code})"
    return Outcome(task, f"{how}, see {task.directory / 'output.log'}; the same command goes on", 1)


def _returned(outcome: Outcome) -> JobReturn:
    """An outcome as Hydra's sweepers know it."""
    from cdpo.errors import CdpoError

    failed = outcome.exit_code != 0
    found = JobReturn(overrides=[outcome.task.command], status=JobStatus.FAILED if failed else JobStatus.COMPLETED)
    found.return_value = CdpoError(outcome.ending) if failed else None
    return found
