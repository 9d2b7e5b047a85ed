"""The runs of a sweep on SLURM, through submitit: submit them as arrays, and ask the queue about them.

How a run ended is read from its own files; squeue says what is still to come, and sacct, where there is accounting,
why one was killed. Nothing here needs accounting.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cdpo.errors import ConfigError
from cdpo.sweep.worker import SlurmTask

KEPT = ("SLURM_CONF",)  # says which cluster, not which job
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def submit(
    files: Sequence[Path],
    logs: Path,
    parameters: dict[str, Any],
    max_requeues: int,
    keep: Callable[[list[dict[str, str]]], None],
) -> list[dict[str, str]]:
    """One job per task file, in arrays as large as the site allows; stdout and stderr go to `logs`. Returns their
    job_id, stdout and stderr, which `keep` is told after each array, so that a kill leaves no job that nobody knows.

    An array waits for the one before, so that array_parallelism holds for all of them together. All or nothing: if one
    array is refused, or anything else goes wrong, those before it are cancelled. Raises ConfigError with the reason.
    """
    import submitit

    if not shutil.which("sbatch"):
        raise ConfigError("hydra/launcher=slurm: no sbatch on this machine; use hydra/launcher=local")
    sent: list[dict[str, str]] = []
    largest = max_array_size()
    srun = ["--kill-on-bad-exit=1"]
    if cores := parameters.get("cpus_per_task"):
        srun.append(f"--cpus-per-task={cores}")  # which srun no longer takes from sbatch, from SLURM 22.05 on
    with _outside_of_any_job():
        executor = submitit.SlurmExecutor(logs / "%j")
        for start in range(0, len(files), largest):
            after = {"dependency": f"afterany:{sent[-1]['job_id'].partition('_')[0]}"} if sent else {}
            try:
                executor.update_parameters(**parameters, **after, srun_args=srun)
                tasks = [SlurmTask(str(file), max_requeues) for file in files[start : start + largest]]
                sent += [_paths(job) for job in executor.submit_array(tasks)]
                keep(sent)
            except BaseException as error:
                cancel([job["job_id"] for job in sent])
                if isinstance(error, (ValueError, RuntimeError)):  # submitit's own errors are RuntimeErrors
                    raise ConfigError(f"SLURM refused the jobs, and none is left: {error}") from error
                raise
    return sent


def _paths(job: Any) -> dict[str, str]:
    return {"job_id": job.job_id, "stdout": str(job.paths.stdout), "stderr": str(job.paths.stderr)}


def max_array_size() -> int:
    """How many jobs one array may have at this site."""
    shown = _output("scontrol", "show", "config")
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    return max(int(found[1]), 1) if found else 1001


class Queued(NamedTuple):
    """A job in the queue."""

    state: str  # PENDING, RUNNING, ...
    reason: str = ""  # why it waits


def queued(ids: Sequence[str]) -> dict[str, Queued]:
    """Those jobs that are still to run or running. May raise ConfigError."""
    if not ids:
        return {}
    wanted = ",".join(sorted({one.partition("_")[0] for one in ids}))
    if not shutil.which("squeue"):
        raise ConfigError("there is no squeue on this machine")
    done = subprocess.run(["squeue", "-h", "-r", "-o", "%i|%T|%r", "-j", wanted], capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise ConfigError((done.stderr.strip() or "squeue failed").splitlines()[0])
    lines = [line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") > 1]
    states = {one: Queued(state, reason) for one, state, reason in lines}
    over = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
    return {one: states[one] for one in ids if one in states and states[one].state not in over}


def accounted(ids: Sequence[str]) -> dict[str, str]:
    """What SLURM's accounting says became of jobs, "FAILED 9:0" for example; {} where there is none."""
    wanted = ",".join(sorted({one.partition("_")[0] for one in ids}))
    lines = _output("sacct", "-n", "-P", "-X", "-o", "JobID,State,ExitCode", "-j", wanted).splitlines()
    return {parts[0]: " ".join(parts[1:]) for parts in (line.split("|") for line in lines) if len(parts) == 3}


def settled(ids: Sequence[str], seconds: float = 10.0) -> dict[str, str]:
    """The same of jobs that have left the queue: accounting may lag behind it, and is asked again for some seconds."""
    deadline = time.monotonic() + seconds
    while ids and "accounting_storage/none" not in _output("scontrol", "show", "config"):
        found = accounted(ids)
        states = {found.get(one, "PENDING").split()[0] for one in ids}
        if not states & {"PENDING", "RUNNING", "COMPLETING"} or time.monotonic() > deadline:
            return found
        time.sleep(0.5)
    return {}


def cancel(ids: Sequence[str]) -> None:
    """Take jobs back."""
    if ids:
        subprocess.run(["scancel", *{one.partition("_")[0] for one in ids}], capture_output=True)


def _output(*command: str) -> str:
    """What a command prints, "" if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


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
