"""Who started this process: alone, or as one of several ranks, by torchrun or SLURM; and where the ranks meet.

Imports no torch.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from typing import NamedTuple

from cdpo.errors import ConfigError


class Place(NamedTuple):
    """This process among the ranks of a run."""

    rank: int
    size: int
    local: int  # rank on this machine


def place() -> Place:
    """As torchrun says, or srun; (0, 1, 0) for a process that stands alone, as a batch script without srun does."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys() and "SLURM_STEP_NUM_TASKS" in os.environ:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    return Place(*(int(os.environ.get(name, default)) for name, default in zip(names, (0, 1, 0))))


def announce(here: Place) -> None:
    """Put into the environment what torch reads there: rank, size, and MASTER_ADDR and MASTER_PORT.

    What is set already stands. Raises ConfigError where nothing says on which machine rank 0 is.
    """
    os.environ |= {"RANK": str(here.rank), "WORLD_SIZE": str(here.size), "LOCAL_RANK": str(here.local)}
    if here.size > 1 and "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_node()
    port = 10_000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20_000  # below what the kernel hands out by itself
    os.environ.setdefault("MASTER_PORT", str(port))


def _first_node() -> str:
    """An address of the first node of the step, on which rank 0 is."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ConfigError("several ranks, but neither MASTER_ADDR nor SLURM_JOB_NODELIST is set: start with torchrun")
    name = _output("scontrol", "show", "hostnames", nodes).split()[0]
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:  # a node may have another name in SLURM than in the network
        found = re.search(r"NodeAddr=(\S+)", _output("scontrol", "show", "node", "-o", name))
        return found[1] if found else name


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"`{' '.join(command)}` failed ({error}); set MASTER_ADDR to the host of rank 0") from error
