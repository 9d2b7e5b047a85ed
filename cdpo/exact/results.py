"""What a search is asked for and what it finds: how hard to look, and what every start came to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Effort:
    """How hard to search: starts, steps of each at most, and the norm of the gradient to reach, over the first one."""

    starts: int
    steps: int
    tolerance: float
    seed: int


@dataclass(frozen=True)
class Searches:
    """What S starts came to. The objective is that of the loss with what the constraints add to it."""

    origins: list[str]  # [S]; where each began
    x: Tensor  # [S, n]; the trained numbers
    change: Tensor  # [S, numbers]
    value: Tensor  # [S]
    multiplier: Tensor  # [S]; of the KL budget, 0 without one
    at_start: float  # the objective at the reference
    at_infinity: Tensor  # [S]; whether an optimum lies there; told of the lowest value only, where values rank
    promised: float  # what one more Newton step from the lowest value would gain; NaN unless that lies at infinity
    proof: str  # why the best is the optimum: "convex", "closed form"; "" where it is the best that was found
