"""The runs of a sweep on SLURM, a job each, through submitit. How a run ended is read from its own files.

Nothing here needs accounting.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cdpo.config.task import Task, file_of
from cdpo.errors import ConfigError
from cdpo.sweep import queue
from cdpo.sweep.launch import at_least
from cdpo.sweep.outcome import PREEMPTED, Outcome, reported
from cdpo.sweep.queue import Queued
from cdpo.sweep.worker import SlurmJob
from cdpo.system.files import read_json, write_json
from cdpo.system.progress import Progress

log = logging.getLogger(__name__)

KEPT = ("SLURM_CONF",)  # says which cluster, not which job
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
#: what the options of cdpo's files and of submitit are called by sbatch
SBATCH = {"timeout_min": "time", "tasks_per_node": "ntasks_per_node", "mem_gb": "mem"}


class Slurm:
    """A SLURM job per run, in arrays. What is not named here is an option of sbatch, as submitit knows them."""

    def __init__(
        self, wait: bool = True, poll_s: float = 10.0, retry_failed: bool = False, max_requeues: int = 3, **sbatch: Any
    ) -> None:
        self.wait, self.poll_s, self.retry_failed, self.max_requeues = wait, poll_s, retry_failed, max_requeues
        given = {key: value for key, value in sbatch.items() if value not in (None, [], {})}
        if "mem_gb" in given:
            given["mem_gb"] = f"{given['mem_gb']}GB"  # a bare number means megabytes
        self.sbatch = {SBATCH.get(key, key): value for key, value in given.items()}

    def check_options(self) -> None:
        """Raises ConfigError."""
        at_least(0, "poll_s", self.poll_s, (int, float))
        at_least(0, "max_requeues", self.max_requeues, int)

    def check(self, task: Task) -> None:
        """ConfigError for a job of several processes whose run is not told how they share it."""
        ranks = self.sbatch.get("nodes", 1) * self.sbatch.get("ntasks_per_node", 1)
        if ranks > 1 and task.composed["trainer"]["distributed"] == "none":
            advice = "set trainer.distributed=ddp or fsdp, or hydra.launcher.nodes=1 hydra.launcher.tasks_per_node=1"
            raise ConfigError(f"{ranks} tasks, and trainer.distributed=none trains in one: {advice}")

    def carry_out(self, tasks: Sequence[Task], jobs: int) -> list[Outcome]:
        """Submit what is not in the queue already; then wait until it is empty, or return at once."""
        if not tasks:
            return []
        sweep = tasks[0].directory.parent
        known = known_jobs({task.directory.parent for task in tasks})
        there = queue.queued([known[task.directory]["job_id"] for task in tasks if task.directory in known])
        new = [task for task in tasks if known.get(task.directory, {}).get("job_id") not in there]

        def keep(sent: list[dict[str, str]]) -> None:
            known.update({task.directory: {**job, "command": task.command} for task, job in zip(new, sent)})
            keep_jobs(known)

        options = {"job_name": f"cdpo-{sweep.name}"} | self.sbatch
        submit([SlurmJob(str(file_of(task)), self.max_requeues) for task in new], sweep / ".submitit", options, keep)
        print(f"{len(new)} jobs submitted, {len(tasks) - len(new)} in the queue before; cdpo-status {sweep}")
        return self._waited(tasks, [known[task.directory]["job_id"] for task in tasks]) if self.wait else []

    def _waited(self, tasks: Sequence[Task], ids: list[str]) -> list[Outcome]:
        """Wait for the jobs of tasks. Ctrl-C ends the waiting, not the jobs."""
        states = dict.fromkeys(ids, Queued("PENDING"))
        with suppress(KeyboardInterrupt), Progress(len(ids), 0, "jobs", quiet=not ids) as bar:
            while states := self._still(ids, states):
                running = [one.state for one in states.values()].count("RUNNING")
                bar.update(len(ids) - len(states), running=running, waiting=len(states) - running)
                time.sleep(self.poll_s)
            bar.update(len(ids))
        over = [(task, job) for task, job in zip(tasks, ids) if job not in states]
        accounts = queue.settled([job for task, job in over if reported(task) is None])
        return [_outcome(task, job, states, accounts) for task, job in zip(tasks, ids)]

    def _still(self, ids: list[str], before: dict[str, Queued]) -> dict[str, Queued]:
        """States of the jobs that are not over; as they were `before` where the controller does not answer."""
        try:
            return queue.queued(ids)
        except ConfigError as error:
            log.warning("%s; asking again in %g s", error, self.poll_s)
            return before


def known_jobs(sweeps: Iterable[Path]) -> dict[Path, dict[str, str]]:
    """The jobs that were submitted, by the directories of their runs; each sweep has them in its jobs.json."""
    files = [file for sweep in sweeps if (file := sweep / "jobs.json").is_file()]
    return {file.parent / name: job for file in files for name, job in read_json(file).items()}


def keep_jobs(known: dict[Path, dict[str, str]]) -> None:
    """Write them into the jobs.json of each sweep."""
    for sweep in {path.parent for path in known}:
        write_json(sweep / "jobs.json", {path.name: job for path, job in known.items() if path.parent == sweep})


def _outcome(task: Task, job: str, states: dict[str, Queued], accounts: dict[str, str]) -> Outcome:
    """What a run says of itself; else what SLURM does."""
    if job in states:
        return Outcome(task, f"job {job} is {states[job].state.lower()}: cdpo-status, scancel {job}", PREEMPTED)
    account = accounts.get(job, "without a word, and there is no accounting")
    ended = f"job {job} was ended by SLURM ({account}), and jobs.json names its logs; the same command goes on"
    return reported(task) or Outcome(task, ended, 1)


# ----------------------------------------------------------------------------------------------------------- submission


def submit(
    work: Sequence[SlurmJob], logs: Path, parameters: dict[str, Any], keep: Callable[[list[dict[str, str]]], None]
) -> list[dict[str, str]]:
    """Jobs in arrays as large as the site allows; stdout and stderr go to `logs`. Returns their job_id, stdout and
    stderr, which `keep` is told after each array, so that a kill leaves no job that nobody knows.

    An array waits for the one before, so that array_parallelism holds for all of them together. All or nothing: if one
    array is refused, or anything else goes wrong, those before it are cancelled. Raises ConfigError with the reason.
    """
    import submitit

    if not shutil.which("sbatch"):
        raise ConfigError("hydra/launcher=slurm: no sbatch on this machine; use hydra/launcher=local")
    sent: list[dict[str, str]] = []
    largest = queue.max_array_size()
    srun = ["--kill-on-bad-exit=1"]
    if cores := parameters.get("cpus_per_task"):
        srun.append(f"--cpus-per-task={cores}")  # which srun no longer takes from sbatch, from SLURM 22.05 on
    with _outside_of_any_job():
        executor = submitit.SlurmExecutor(logs / "%j")
        for start in range(0, len(work), largest):
            after = {"dependency": f"afterany:{sent[-1]['job_id'].partition('_')[0]}"} if sent else {}
            try:
                executor.update_parameters(**parameters, **after, srun_args=srun)
                sent += [_paths(job) for job in executor.submit_array(work[start : start + largest])]
                keep(sent)
            except BaseException as error:
                queue.cancel([job["job_id"] for job in sent])
                if isinstance(error, (ValueError, RuntimeError)):  # submitit's own errors are RuntimeErrors
                    raise ConfigError(f"SLURM refused the jobs, and none is left: {error}") from error
                raise
    return sent


def _paths(job: Any) -> dict[str, str]:
    return {"job_id": job.job_id, "stdout": str(job.paths.stdout), "stderr": str(job.paths.stderr)}


@contextmanager
def _outside_of_any_job() -> Iterator[None]:
    """Without the SLURM_* of an allocation that we may be in: sbatch hands it to the new jobs, whose srun fails.

    Nor a place among ranks, which the new jobs have of their own. SBATCH_*, a person's own defaults, stay.
    """
    ours = ("SLURM_", "SLURMD_", "SUBMITIT_")
    gone = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if (name.startswith(ours) and name not in KEPT) or name in RANKS
    }
    try:
        yield
    finally:
        os.environ.update(gone)
