"""A pull towards the start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from cdpo.constraints.constraint import Constraint
from cdpo.constraints.lora import LoRA

if TYPE_CHECKING:
    from cdpo.model.change import Change


@dataclass
class L2ToStart(Constraint):
    """After every step, the change shrinks to theta_0 + (theta - theta_0) / (1 + learning_rate * strength).

    That is the proximal step of the penalty strength/2 * ||theta - theta_0||^2 (L2-SP, Li et al. 2018, arXiv
    1802.01483), stable at any strength; momentum m makes it (1 - m) times that penalty, as steps grow and the pull does
    not. With LoRA it is the penalty on the adapters' products.
    """

    strength: float

    convex = True
    euclidean = True
    not_with_lbfgs = "moving the parameters after a step invalidates L-BFGS's curvature; use optimizer=sgd or adamw"

    def __post_init__(self) -> None:
        if not 0 < self.strength < math.inf:
            raise ValueError(f"strength={self.strength}; choose a positive strength")

    def conflict(self, other: Constraint) -> str:
        if isinstance(other, LoRA) and other.dora:
            return "a DoRA change is not linear in its factors, so it cannot be shrunk; set dora=false"
        return ""

    def begin(self, model: nn.Module, change: Change) -> None:
        self.change = change

    def parameter_penalty(self) -> Tensor:
        """strength / 2 * ||theta - theta_0||^2."""
        return self.strength / 2 * self.change.square_norm()

    def after_step(self, model: nn.Module, metrics: Mapping[str, float]) -> None:
        share = 1 / (1 + metrics["learning_rate"] * self.strength)
        self.change.scale(dict.fromkeys(self.change.names, share))

    def report(self) -> dict[str, float]:
        """`norm`: L2 norm of the change, which is what is being pulled to zero."""
        return {"binds": 1.0, "norm": self.change.norm()}
