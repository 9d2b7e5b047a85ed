"""The runs of a sweep on SLURM, through submitit: submit them as arrays, and ask the queue about them.

How a run ended is read from its own files; squeue says what is still to come, and sacct, where there is accounting,
why one was killed. Nothing here needs accounting.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cdpo.errors import ConfigError
from cdpo.work import SlurmTask

KEPT = ("SLURM_CONF",)  # says which cluster, not which job


def submit(files: Sequence[Path], logs: Path, parameters: dict[str, Any], max_requeues: int) -> list[dict[str, str]]:
    """One job per task file, in arrays as large as the site allows; stdout and stderr go to `logs`. Returns their
    job_id, stdout and stderr.

    An array waits for the one before, so that array_parallelism holds for all of them together. All or nothing: if one
    array is refused, those before it are cancelled. Raises ConfigError with the reason.
    """
    import submitit

    if not shutil.which("sbatch"):
        raise ConfigError("hydra/launcher=slurm: no sbatch on this machine; use hydra/launcher=local")
    jobs: list[Any] = []
    largest = max_array_size()
    with _outside_of_any_job():
        executor = submitit.SlurmExecutor(logs / "%j")
        for start in range(0, len(files), largest):
            after = {"dependency": f"afterany:{jobs[-1].job_id.partition('_')[0]}"} if jobs else {}
            try:
                executor.update_parameters(**parameters, **after, srun_args=["--kill-on-bad-exit=1"])
                tasks = [SlurmTask(str(file), max_requeues) for file in files[start : start + largest]]
                jobs += executor.submit_array(tasks)
            except (ValueError, RuntimeError) as error:  # submitit's own errors are RuntimeErrors
                cancel([job.job_id for job in jobs])
                raise ConfigError(f"SLURM refused the jobs, and none is left: {error}") from error
    return [{"job_id": job.job_id, "stdout": str(job.paths.stdout), "stderr": str(job.paths.stderr)} for job in jobs]


def max_array_size() -> int:
    """How many jobs one array may have at this site."""
    shown = _output("scontrol", "show", "config")
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    return max(int(found[1]), 1) if found else 1001


def queued(ids: Sequence[str]) -> dict[str, str]:
    """State (PENDING, RUNNING, ...) of those jobs that are still to run or running. May raise ConfigError."""
    if not ids:
        return {}
    wanted = ",".join(sorted({one.partition("_")[0] for one in ids}))
    if not shutil.which("squeue"):
        raise ConfigError("there is no squeue on this machine")
    done = subprocess.run(["squeue", "-h", "-r", "-o", "%i|%T", "-j", wanted], capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise ConfigError((done.stderr.strip() or "squeue failed").splitlines()[0])
    states = dict(line.split("|", 1) for line in done.stdout.splitlines() if "|" in line)
    over = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
    return {one: states[one] for one in ids if one in states and states[one] not in over}


def accounted(ids: Sequence[str]) -> dict[str, str]:
    """What SLURM's accounting says became of jobs, "FAILED 9:0" for example; {} where there is none."""
    wanted = ",".join(sorted({one.partition("_")[0] for one in ids}))
    lines = _output("sacct", "-n", "-P", "-X", "-o", "JobID,State,ExitCode", "-j", wanted).splitlines()
    return {parts[0]: " ".join(parts[1:]) for parts in (line.split("|") for line in lines) if len(parts) == 3}


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
    """Without the SLURM_* of an allocation that we may be in: sbatch hands it to the new jobs, whose srun fails."""
    ours = ("SLURM_", "SLURMD_", "SBATCH_", "SUBMITIT_")
    gone = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(ours) and name not in KEPT}
    try:
        yield
    finally:
        os.environ.update(gone)
