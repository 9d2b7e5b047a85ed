"""One task of a sweep in a process of its own: `python -m cdpo.sweep.worker FILE`, or forked, or started by SLURM.

Sees plain values only. Under SLURM it also does what a signal calls for, once the run is saved.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpo.config.task import REQUEUES, Task, file_of, read_task
from cdpo.errors import Preempted, rank_0_says
from cdpo.sweep.outcome import done, failure, write_ending
from cdpo.system.files import read_json, write_json
from cdpo.system.rendezvous import place
from cdpo.system.signals import Signals
from cdpo.training.directory import RunDirectory

log = logging.getLogger(__name__)

ATTEMPTS = 5  # to requeue a job


def carry_out(file: Path, threads: int | None = None) -> Exception | None:
    """Do the run that `file` describes, and write beside it how it ended. Returns why it did not finish.

    Of several ranks that were started with one file, only the first writes.
    """
    task, rank = read_task(file), place().rank
    if rank:
        logging.disable()
    else:
        _log_to(RunDirectory(task.directory).train_log)
    outcome, error = done(task), None
    try:
        from cdpo.training.job import run  # with torch, after the signals of a SLURM task are handled

        run(task, threads)
    except Exception as fault:
        log.error("%s", fault)
        error = fault.with_traceback(None)
        if rank == 0:
            outcome = failure(task, fault)
        elif not rank_0_says(fault):
            print(f"rank {rank}: {type(fault).__name__}: {fault}", file=sys.stderr)
    if rank == 0:
        write_ending(outcome, signal=getattr(error, "signal", None))
    return error


def _log_to(path: Path) -> None:
    """Messages go to stderr and to the run's own log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain, dated = logging.StreamHandler(), logging.FileHandler(path, delay=True)
    dated.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[plain, dated], force=True)
    logging.getLogger("cdpo").setLevel(logging.INFO)


def _requeue(job: str) -> None:
    """Ask the controller to; a busy one may not answer at first. Raises what subprocess does if it never does."""
    for again in range(ATTEMPTS):
        last = again + 1 == ATTEMPTS
        with suppress(*([] if last else [subprocess.CalledProcessError, subprocess.TimeoutExpired])):
            subprocess.run(["scontrol", "requeue", job], timeout=20, check=True)
            return
        time.sleep(2)


@dataclass
class SlurmJob:
    """What submitit calls on a node. SLURM starts it again after a requeue, and the run goes on from its checkpoint."""

    file: str  # of the task
    max_requeues: int = 3  # requeues without a new step, after which the job fails

    def __call__(self) -> None:
        """Raises SystemExit with the run's exit code, so that SLURM says FAILED."""
        with Signals():  # before the heavy imports; the run has its own within
            error = carry_out(Path(self.file))
            if isinstance(error, Preempted):
                self._stop(error.signal)
        if error is not None:
            sys.exit(getattr(error, "exit_code", 1))

    def checkpoint(self, *_: Any, **__: Any) -> Any:
        """For a USR2 that comes before the call above: submitit requeues what can be checkpointed."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def may_requeue(self, task: Task) -> bool:
        """Whether steps were done since the last requeue, or at most `max_requeues` in a row without any; it counts."""
        path, step = file_of(task, REQUEUES), RunDirectory(task.directory).step()
        before = read_json(path) if path.is_file() else {"step": -1, "without_progress": 0, "total": 0}
        idle = 0 if step > before["step"] else before["without_progress"] + 1
        if idle > self.max_requeues:
            log.error("not requeued: %d times without a new step; give it more time (hydra.launcher.timeout_min)", idle)
            return False
        write_json(path, {"step": step, "without_progress": idle, "total": before["total"] + 1})
        return True

    def _stop(self, signal: str | None) -> None:
        """After SIGTERM wait to be killed: SLURM requeues a preempted job, but not one that has ended by itself.

        USR1, USR2: time is up; requeue. Never after SIGTERM, which scancel sends too: a requeue would revive the job.
        """
        if signal in ("SIGUSR1", "SIGUSR2") and (place().rank or self.may_requeue(read_task(Path(self.file)))):
            if place().rank == 0:
                _requeue(os.environ["SLURM_JOB_ID"])
            log.info("requeued; waiting to be stopped")
            time.sleep(600)
        elif signal == "SIGTERM":
            log.info("saved; waiting to be stopped")
            time.sleep(3600)


if __name__ == "__main__":
    problem = carry_out(Path(sys.argv[1]))
    sys.exit(getattr(problem, "exit_code", 1) if problem else 0)
