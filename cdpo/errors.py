"""What can go wrong, with the exit code of each. A message says what, where, and what to change."""

from __future__ import annotations


class CdpoError(Exception):
    """Anything that ends a run on purpose; `exit_code` is what the process returns."""

    exit_code = 1
    told = False  # whether rank 0 says it for all


class ConfigError(CdpoError, ValueError):
    """A setting that cannot be used: unknown key, wrong type, out of range, impossible combination."""

    exit_code = 2


class DataError(CdpoError, ValueError):
    """Rows that cannot be used; the message names file and line."""

    exit_code = 3


class NumericsError(CdpoError, ArithmeticError):
    """NaN or infinity in a log-prob, a loss or a gradient; raised before the optimizer steps."""

    exit_code = 4


class DeviceFull(CdpoError, RuntimeError):
    """The device's memory does not hold what a step needs; the message says what would take less."""

    exit_code = 2


class RankLost(CdpoError, RuntimeError):
    """Another rank of this run died, or does not answer; its own message says why."""


class DiskError(CdpoError, OSError):
    """A file that could not be written; what had been saved before is intact."""

    exit_code = 74


class Preempted(CdpoError):
    """A signal asked the run to stop; it has been saved and the same command resumes it."""

    exit_code = 75

    def __init__(self, message: str, signal: str | None = None) -> None:
        super().__init__(message)
        self.signal = signal  # "SIGTERM", for example


def rank_0_says(error: Exception) -> bool:
    """Whether another rank need not print its error: rank 0 has met it too, or was told (`Ranks.on_all`)."""
    return isinstance(error, (ConfigError, DataError, Preempted, RankLost)) or getattr(error, "told", False)
