"""Signals that ask a run to stop. A handler only sets a flag; the loop polls it where it can stop and save."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Signals:
    """While entered, SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 are remembered and do not kill; a second one exits at once.

    The same signal within half a second is the same request: a launcher passes on what SLURM sends to all processes.

    Entered within another Signals, it goes on from what that one has received.

    SLURM sends SIGTERM to preempt and, if asked to with `--signal`, USR1 or USR2 before the time limit. Does nothing
    outside the main thread, where Python allows no handlers. Raises nothing.
    """

    HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self._pending: str | None = None
        self._owner, self._received = 0, 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def poll(self) -> str | None:
        """The name of the signal that asked to stop, "SIGTERM" for example, or None."""
        return self._pending

    def request(self, name: str) -> None:
        """Ask to stop, as the signal of that name does."""
        self._pending, self._received = name, time.monotonic()

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._owner = os.getpid()
            self._previous = {number: signal.signal(number, self._receive) for number in self.HANDLED}
            outer = getattr(self._previous[self.HANDLED[0]], "__self__", None)
            if isinstance(outer, Signals) and self._pending is None:
                self._pending, self._received = outer._pending, outer._received
        return self

    def __exit__(self, *fault: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if os.getpid() != self._owner:  # a forked worker inherits the handler, and should die as workers do
            os._exit(128 + number)
        if self._pending == name and time.monotonic() - self._received < 0.5:
            return
        if self._pending is not None:
            os.write(2, f"\n{name} after {self._pending}: exiting at once, without saving\n".encode())
            os._exit(128 + number)
        self.request(name)


@contextmanager
def withheld() -> Iterator[None]:
    """Processes that are started within the block never get the signals that ask a run to stop.

    For helpers that end when this process does, and that it waits for until then. A signal that comes within the block
    arrives at its end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, Signals.HANDLED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
