"""Runs that several ranks do together: `ranked.py JOBS.json` in each of their processes, a list of jobs.

A job: config, directory, and on some ranks a fault that comes with a step: a signal, an exception, or SIGKILL.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import forking


def together(jobs: list[dict[str, Any]], folder: Path, ranks: int = 2) -> str:
    """Do the jobs, one after another, on so many ranks, which all end well; returns all that was printed."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place |= {"PYTHONPATH": str(Path(__file__).parent)}
    started = [
        forking.Program(
            "-m", "ranked", folder / "jobs.json", env=os.environ | place | {"RANK": str(i), "LOCAL_RANK": str(i)}
        )
        for i in range(ranks)
    ]
    assert [one.wait() for one in started] == [0] * ranks, [one.err for one in started]
    return "".join(one.out + one.err for one in started)


def by_torchrun(jobs: list[dict[str, Any]], folder: Path, ranks: int = 2) -> tuple[int, str]:
    """The same by torchrun, which ends all ranks where one has died; its exit code and all that was printed."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*torchrun, __file__, str(folder / "jobs.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return done.returncode, done.stdout + done.stderr


def _do(job: dict[str, Any]) -> None:
    from composing import train

    from cdpo.errors import CdpoError
    from cdpo.training import loop

    real = loop.accumulate
    rank = int(os.environ["RANK"])

    def faulty(run: Any, *rest: Any) -> None:
        real(run, *rest)
        if job.get("rank") == rank and run.state.step + 1 == job["step"]:
            if job["fault"] == "raise":
                raise RuntimeError("on purpose")
            os.kill(os.getpid(), getattr(signal, job["fault"]))

    loop.accumulate = faulty
    try:
        train(job["config"], Path(job["folder"]))
    except (CdpoError, RuntimeError) as error:
        ending = {"ending": f"{type(error).__name__}: {error}"}
        Path(f"{job['folder']}.rank{rank}.json").write_text(json.dumps(ending))
    finally:
        loop.accumulate = real


def _check_threads() -> None:
    """A thread of gloo that outlives the interpreter aborts the process now and then: here always, with code 99."""
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    if any("gloo" in name for name in names):
        print("threads of a process group are alive at the end:", sorted(names), file=sys.stderr, flush=True)
        os._exit(99)


if __name__ == "__main__":
    atexit.register(_check_threads)  # runs after what is registered later
    for one in json.loads(Path(sys.argv[1]).read_text()):
        _do(one)
