"""Threads that wait for one another give their core back soon: another process may need it."""

from __future__ import annotations

import os

SPINS = "1000"  # turns of a waiting thread before it sleeps; GNU's OpenMP makes 300,000, of about a millisecond


def wait_in_turns() -> None:
    """To be called before torch is imported, whose threads read it once. Changes no number. A user's choice stays."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS
