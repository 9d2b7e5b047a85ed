"""What can go wrong, with the exit code of each. A message says what, where, and what to change."""


class CdpoError(Exception):
    """Anything that ends a run on purpose; `exit_code` is what the process returns."""

    exit_code = 1


class ConfigError(CdpoError, ValueError):
    """A setting that cannot be used: unknown key, wrong type, out of range, impossible combination."""

    exit_code = 2


class DataError(CdpoError, ValueError):
    """Rows that cannot be used; the message names file and line."""

    exit_code = 3


class NumericsError(CdpoError, ArithmeticError):
    """NaN or infinity in a log-prob, a loss or a gradient; raised before the optimizer steps."""

    exit_code = 4


class DiskError(CdpoError, OSError):
    """A file that could not be written; what had been saved before is intact."""

    exit_code = 74


class Preempted(CdpoError):
    """A signal asked the run to stop; it has been saved and the same command resumes it."""

    exit_code = 75
