"""SLURM's own commands: squeue says what is still to come, sacct, where there is accounting, why a job was killed."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple

from cdpo.errors import ConfigError

LAG_S = 10.0  # how long accounting may know less than the queue


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


def settled(ids: Sequence[str]) -> dict[str, str]:
    """The same of jobs that have left the queue: accounting may lag behind it, and is asked again for a while."""
    deadline = time.monotonic() + LAG_S
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
