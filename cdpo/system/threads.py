"""What torch starts beside us: threads that wait for one another, and processes that compile."""

from __future__ import annotations

import os

from cdpo.system.signals import withheld

SPINS = "1000"  # turns of a waiting thread before it sleeps; GNU's OpenMP makes 300,000, of about a millisecond


def wait_in_turns() -> None:
    """To be called before torch is imported, whose threads read it once. Changes no number. A user's choice stays."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def start_compile_workers() -> None:
    """Before the first compilation: a signal to the whole process group would end them, and torch waits for ever."""
    with withheld():
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.warm_pool()
