"""What constraints share that project the parameters back into a set after every step.

Every such set here is a neighbourhood of the start that contains theta_0 + c * (theta - theta_0), weight by weight, for
0 <= c <= 1, and every projection only shrinks changes. So several of them keep all their promises, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from cdpo.constraints.constraint import Constraint

if TYPE_CHECKING:
    from cdpo.model.change import Change


ON_BOUNDARY = 1e-9  # in the unit of the set


@dataclass
class Projection(Constraint):
    """Counts the steps that left the set. Subclasses call `record` in `after_step` and project if it says so."""

    not_with_lbfgs = "moving the parameters after a step invalidates L-BFGS's curvature; use optimizer=sgd or adamw"

    steps_projected: int = field(init=False, default=0)
    slack: float = field(init=False, default=0.0)  # distance to the boundary before projecting, negative if outside

    def begin(self, model: nn.Module, change: Change) -> None:
        self.change = change

    def record(self, slack: float) -> bool:
        """Remember how far inside the set the step ended; whether it ended outside."""
        self.slack = slack
        self.steps_projected += slack < 0
        return slack < 0

    def report(self) -> dict[str, float]:
        """`binds`: the last step ended outside or on the boundary; `boundary_distance`: how far inside it was."""
        return {
            "binds": float(self.slack <= ON_BOUNDARY),
            "boundary_distance": max(self.slack, 0.0),
            "steps_projected": float(self.steps_projected),
        }
