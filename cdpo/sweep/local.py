"""The runs of a sweep on this machine, one process each.

`python -m cdpo.sweep.local < PLAN` imports what training needs, once, does nothing else, and forks: so a run starts at
once, and one that is killed, or kills itself, leaves the others alone. Each run that has ended is a line of JSON.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpo.config.task import Task, file_of, read_task
from cdpo.sweep.launch import at_least
from cdpo.sweep.outcome import PREEMPTED, Outcome, read_ending, reported
from cdpo.sweep.worker import carry_out
from cdpo.system.progress import Progress
from cdpo.system.signals import Signals
from cdpo.training.directory import RunDirectory


@dataclass(frozen=True)
class Local:
    """At most `at_once` runs at a time, each in its own process; null: one per visible GPU, or else per core."""

    at_once: int | None = None
    retry_failed: bool = False

    def check_options(self) -> None:
        """Raises ConfigError."""
        if self.at_once is not None:
            at_least(1, "at_once", self.at_once, int)

    def check(self, task: Task) -> None:
        """Any run can be done here."""

    def carry_out(self, tasks: Sequence[Task], jobs: int) -> list[Outcome]:
        """Do the tasks, which are part of a sweep of so many jobs. Signals that come here reach the runs."""
        if not tasks:
            return []
        by_file = {str(file_of(task)): task for task in tasks}
        codes: dict[str, int] = {}
        plan = {"files": list(by_file), "jobs": jobs, "at_once": self.at_once}
        with _pool(plan) as lines, Progress(len(tasks), 0, "runs") as bar:
            for line in lines:
                ended = json.loads(line)
                codes[ended["file"]] = ended["code"]
                bar.update(len(codes))
        return [reported(task) or read_ending(task) or _killed(task, codes.get(file)) for file, task in by_file.items()]


@contextmanager
def _pool(plan: dict[str, Any]) -> Iterator[Any]:
    """`main` at work on a plan, in a session of its own: it gets signals from here only, each of them once."""
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


def _killed(task: Task, code: int | None) -> Outcome:
    """The outcome of a process that ended without a word; None: it was never started."""
    if code is None:
        ending = "not started, as the sweep was asked to stop; the same command starts it"
        return Outcome(task, ending, PREEMPTED)
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended by an exit({code})"
    return Outcome(task, f"{how}, see {RunDirectory(task.directory).output_log}; the same command goes on", 1)


# ------------------------------------------------------------------------------------------ the process that forks


def main() -> None:
    """Plan on stdin: {"files": of tasks, "jobs": in the whole sweep, "at_once": or null}. Lines: {"file", "code"}."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to count GPUs must not use one: a fork would break
    import cdpo.training.job  # noqa: F401

    plan = json.load(sys.stdin)
    gpus = _gpus()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_once = plan["at_once"] or min(len(gpus) or cores, plan["jobs"])
    Pool(at_once, gpus, max(1, cores // at_once)).run(plan["files"])


def _gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES wants them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    listed = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    return [] if listed and listed[0].startswith("-") else listed  # -1 hides them all


class Pool:
    """At most `at_once` processes with `threads` each, the i-th on GPU i. A signal is passed on, and ends it all."""

    def __init__(self, at_once: int, gpus: list[str], threads: int) -> None:
        self.gpus, self.threads = gpus, threads
        self.free, self.running = list(range(at_once)), dict[int, tuple[str, int]]()
        self.stopping: int | None = None  # the signal that asked to

    def run(self, files: list[str]) -> None:
        """Do them all."""
        for number in Signals.HANDLED:
            signal.signal(number, self._pass_on)
        for file in files:
            while not self.free:
                self._reap()
            self._start(file)
        while self.running:
            self._reap()

    def _start(self, file: str) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, Signals.HANDLED)  # none may come between here and `running`
        if not self.stopping:
            slot = self.free.pop(0)
            pid = os.fork()
            if pid == 0:
                child(lambda: self._task(file, slot))
            self.running[pid] = file, slot
            if self.stopping:  # another thread of this process took the signal meanwhile
                self._pass_on(self.stopping)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, Signals.HANDLED)

    def _task(self, file: str, slot: int) -> int:
        write_to(RunDirectory(read_task(Path(file)).directory).output_log)
        if self.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        error = carry_out(Path(file), self.threads)
        return getattr(error, "exit_code", 1) if error else 0

    def _reap(self) -> None:
        pid, status = os.wait()
        file, slot = self.running.pop(pid)
        self.free.append(slot)
        try:
            print(json.dumps({"file": file, "code": os.waitstatus_to_exitcode(status)}), flush=True)
        except BrokenPipeError:  # whoever asked is gone
            self._pass_on(signal.SIGTERM)

    def _pass_on(self, number: int, *_: Any) -> None:
        self.stopping = number
        for pid in self.running:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, number)


def write_to(path: Path) -> None:
    """What this process prints, a crash's last words too, goes to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stream in (1, 2):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), stream)
    faulthandler.enable()


def child(work: Callable[[], int]) -> None:
    """Never returns: ends this process with the code of `work`. A signal is remembered until the run asks for it."""
    code = 1
    try:
        with Signals():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, Signals.HANDLED)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            code = work()
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for number in Signals.HANDLED:  # the handlers of the process that forked would pass them on to the others
            signal.signal(number, signal.SIG_IGN)
        with suppress(OSError, ValueError):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
