"""Python programs that start at once: forked from a process that has imported what they import.

torch and transformers take five seconds to import, and tests start a hundred programs. `run` and `Program` take what
would follow `python`: `-c CODE` or `-m MODULE`, and arguments. All else is as for a process of its own: pid, signals,
files, exit code; but what an interpreter reads when it starts (PYTHONHASHSEED, OMP_NUM_THREADS) is the same for all.
What a program starts by `subprocess` as `python -m MODULE` is a fork of it in turn.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path

IMPORTED = "cdpo.training.job", "cdpo.sweep.estimate", "cdpo.report.write", "cdpo.report.figures", "cdpo.report.curves"


class Program:
    """One that runs; `out` and `err` are what it has printed."""

    def __init__(self, *arguments: object, env: Mapping[str, str] = os.environ, cwd: Path | None = None) -> None:
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.returncode: int | None = None
        asked = {"arguments": list(map(str, arguments)), "env": dict(env), "cwd": str(cwd or Path.cwd())}
        with open(os.devnull, "rb") as nothing:
            files = [nothing.fileno(), self._out.fileno(), self._err.fileno()]
            socket.send_fds(_forker(), [json.dumps(asked).encode()], files)
        self.pid = int(_forker().recv(100))

    def poll(self) -> int | None:
        """The exit code, -n after signal n; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """The exit code, once it has ended. AssertionError, and the end of it, if it takes longer."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise AssertionError(f"not done after {timeout} s\n{self.err}")
            time.sleep(0.01)
        return self.returncode  # type: ignore[return-value]

    def send_signal(self, number: int) -> None:
        """To this process alone, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def out(self) -> str:
        return _text(self._out)

    @property
    def err(self) -> str:
        return _text(self._err)


def run(*arguments: object, check: bool = False, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """Like subprocess.run, with everything captured, as text."""
    program = Program(*arguments, **options)
    code = program.wait(timeout)
    assert not (check and code), program.err
    return subprocess.CompletedProcess(arguments, code, program.out, program.err)


def _text(file) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()


@cache
def _forker() -> socket.socket:
    """A line to the process that forks, which is started here and ends when this one does."""
    set_child_subreaper = 36  # prctl(2): programs, whose parent ends at once, become children of this process
    assert ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0) == 0
    own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # no threads before a fork
    subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=env)
    theirs.close()
    return own


# ------------------------------------------------------------------------------------------ the process that forks


def main() -> None:
    line = socket.socket(fileno=int(sys.argv[1]))
    for name in IMPORTED:
        __import__(name)
    while True:
        message, files, _, _ = socket.recv_fds(line, 1 << 20, 3)
        if not message:
            return
        read, write = os.pipe()
        first = os.fork()
        if first == 0:
            second = os.fork()
            if second == 0:
                for file in (line.fileno(), read, write):
                    os.close(file)
                _become(json.loads(message), files)
            os.write(write, str(second).encode())
            os._exit(0)
        os.waitpid(first, 0)  # from here on the second is a child of the tests
        line.send(os.read(read, 100))
        for file in (*files, read, write):
            os.close(file)


def _become(asked: dict, files: list[int]) -> None:
    """Never returns."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.path[:1] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    subprocess.Popen = Forked  # type: ignore[misc]
    _end(*asked["arguments"])


class Forked(subprocess.Popen):
    """`python -m MODULE` without an interpreter of its own."""

    def __init__(self, args, **options) -> None:
        if isinstance(args, list) and args[:2] == [sys.executable, "-m"] and not options.get("env"):
            sys.stdout.flush()
            options["preexec_fn"] = lambda: _anew(args[1:])  # called where the interpreter would have been started
        super().__init__(args, **options)


def _anew(arguments: list[str]) -> None:
    """As if nothing had been opened, logged or left for the end. Never returns."""
    atexit._clear()
    logging.root.handlers.clear()
    gc.freeze()  # what owns a file must not close the number of another
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    _end(*arguments)


def _end(*arguments: str) -> None:
    """The program, and the end of this process with its exit code."""
    code = 1
    try:
        _do(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _do(option: str, what: str, *arguments: str) -> None:
    sys.argv = [option, *arguments]
    if option == "-m":
        sys.argv[0] = what
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(module))


if __name__ == "__main__":
    main()
