"""A line in the log now and then, which says how far a search is."""

from __future__ import annotations

import logging
import time

from torch import Tensor

from cdpo.exact.descent import Points

log = logging.getLogger(__name__)
EVERY = 30.0  # seconds


class Watch:
    """Hears of every step of a search, and says how far it is at most every EVERY seconds."""

    def __init__(self) -> None:
        self.said = time.monotonic()

    def __call__(self, step: int, steps: int, points: Points, moving: Tensor) -> None:
        """So many steps of so many are done; `moving`: which starts are still on their way. [S]"""
        if time.monotonic() - self.said >= EVERY:
            self.said = time.monotonic()
            lowest, starts = float(points.value.min()), len(moving)
            log.info("search: step %d/%d, %d of %d starts on their way, lowest value %.6g",
                     step, steps, int(moving.sum()), starts, lowest)  # fmt: skip
